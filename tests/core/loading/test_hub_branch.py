"""A branch as revision: the component cache asks the Hub what it means once, and keeps to that commit."""

from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.flavours import BASE_COMMIT
from hub_cases import cache_fixture, chroma_files, hub_fixture  # noqa: F401

OTHER = "ab" * 20


def test_a_branch_is_asked_for_once_and_means_one_commit(hub, cache):
    components, spec = ComponentCache(), ModelSpec("base", revision="main")
    assert components._pinned(spec, "vae").revision == BASE_COMMIT
    hub.commits[OTHER] = chroma_files()
    hub.branches["main"] = OTHER
    asked = len(hub.log)
    for part in ("vae", "text_encoder"):
        assert components._pinned(spec, part).revision == BASE_COMMIT
    assert len(hub.log) == asked
    components.clear()
    assert components._pinned(spec, "vae").revision == OTHER
