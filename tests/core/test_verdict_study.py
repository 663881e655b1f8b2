"""What the page about verdicts says is what its numbers say, with the verdict as it is now."""

from __future__ import annotations

import json

from chroma_core.training.run.verdict import kind_of
from tools.verdict_study import DATA, PAGE, WELL, alone_in_words, in_words, judged, summary, tables


def test_the_page_follows_from_the_numbers_and_no_ruined_job_is_called_well():
    study = json.loads(DATA.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert all(text in page for text in (in_words(study), alone_in_words(study), *tables(study)))
    found = summary(study)
    assert found["ruined"] >= 10 and found["ruined_called_well"] == 0
    assert found["jobs"] >= 60 and found["right"] >= 0.9 * found["jobs"]
    alone = found["alone_jobs"] - found["alone_unclear"]
    assert found["alone_right"] >= 0.85 * alone and found["alone_ruined_called_well"] <= 0.1 * found["ruined"]
    assert {kind_of(row.evidence) for row in judged(study)} & set(WELL), "some jobs are well"
