"""Downloads, with the real huggingface_hub client against a server on loopback that speaks the Hub's file protocol."""

import logging
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache

from chroma_core.errors import ModelFileError
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.hub import PARTS, fetch
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.flavours import BASE_COMMIT, FLAVOURS, flavour
from hub_cases import SHARD, TRANSFORMER, assert_same, cache_fixture, chroma_files, hub_fixture, partial, present  # noqa: F401
from hub_server import REPOSITORY, Fault, sha256

OTHER = "ab" * 20
BASE = flavour("base")
LOCAL = "models/diffusion_models"

if int(huggingface_hub.__version__.partition(".")[0]) < 1:  # which leaves the connection of a cancelled download open
    pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_flavours_are_pinned_to_commits():
    for name in ("base", "hd", "flash"):
        assert len(bytes.fromhex(FLAVOURS[name].revision or "")) == 20
    assert fetch(flavour("tiny"), PARTS) == flavour("tiny").folder


def test_only_the_parts_asked_for_and_never_twice(hub, cache):
    seen: list[tuple[int, int, str]] = []
    folder = fetch(BASE, ["transformer"], on_progress=lambda *now: seen.append(now))
    assert folder == cache / "models--lodestones--Chroma1-Base" / "snapshots" / BASE_COMMIT
    assert present(folder) == {*TRANSFORMER, "model_index.json"}
    assert_same(folder)
    total = sum(len(chroma_files()[name]) for name in present(folder))
    assert {now[1] for now in seen} == {total} and seen[-1][0] == total
    assert [now[0] for now in seen] == sorted(now[0] for now in seen)
    assert any(10 << 20 <= now[0] <= 20 << 20 and now[2] == SHARD for now in seen)  # within the file, not only after it

    asked = len(hub.log)
    assert fetch(BASE, ["transformer"]) == folder
    assert len(hub.log) == asked

    fetch(BASE, PARTS)
    assert not any(SHARD in r.path for r in hub.log[asked:])
    parts = {name for name in chroma_files() if name.partition("/")[0] in PARTS}
    copies = {n for n in parts if n.endswith((".bin", "model.fp16.safetensors"))}
    assert present(folder) == parts - copies - {"transformer/diffusion_pytorch_model.safetensors"} | {
        "model_index.json"
    }
    assert_same(folder, present(folder))
    assert not any("scheduler" in r.path or r.path.endswith("Chroma1-Base.safetensors") for r in hub.log)


def test_the_cache_is_shared_with_the_client_both_ways(hub, cache):
    folder = fetch(BASE, ["vae"])
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert try_to_load_from_cache(REPOSITORY, weights, cache, BASE_COMMIT) == str(folder / weights)
    report = scan_cache_dir(cache)
    assert not report.warnings
    assert {r.commit_hash for repo in report.repos for r in repo.revisions} == {BASE_COMMIT}

    theirs = snapshot_download(
        REPOSITORY,
        revision=BASE_COMMIT,
        allow_patterns=["vae/*", "tokenizer/*"],
        cache_dir=cache,
        endpoint=hub.endpoint,
    )
    assert len(hub.asked(f"storage/{sha256(chroma_files()[weights])}")) == 1  # they took ours
    asked = len(hub.log)
    assert fetch(BASE, ["vae", "tokenizer"]) == Path(theirs) and len(hub.log) == asked  # we take theirs


def test_a_cut_connection_goes_on_in_the_middle_of_the_file(hub, cache):
    digest = sha256(chroma_files()[SHARD])
    hub.faults = [Fault(digest, cut=13 << 20), Fault(digest, cut=11 << 20, ranged=True)]
    folder = fetch(BASE, ["transformer"])
    assert [r.range for r in hub.asked(digest)] == [None, f"bytes={10 << 20}-", f"bytes={20 << 20}-"]
    assert_same(folder)


def test_a_broken_download_is_continued_by_the_next_call(hub, cache):
    digest = sha256(chroma_files()[SHARD])
    hub.faults = [Fault(digest, cut=13 << 20), Fault(SHARD, status=503, times=99, ranged=True)]
    with pytest.raises(ModelFileError, match="503.*kept") as caught:
        fetch(BASE, ["transformer"])
    assert LOCAL in str(caught.value)
    assert partial(cache).stat().st_size == 10 << 20

    hub.faults, asked = [], len(hub.log)
    seen: list[tuple[int, int, str]] = []
    folder = fetch(BASE, ["transformer"], on_progress=lambda *now: seen.append(now))
    assert [r.range for r in hub.log[asked:] if digest in r.path] == [f"bytes={10 << 20}-"]
    assert_same(folder)
    assert not partial(cache).exists()
    assert next(done for done, _, name in seen if name == SHARD) >= 10 << 20


def test_a_server_that_ignores_ranges_sends_the_file_again(hub):
    digest = sha256(chroma_files()[SHARD])
    hub.faults = [Fault(digest, cut=13 << 20), Fault(digest, ranged=True, whole=True)]
    assert_same(fetch(BASE, ["transformer"]))
    assert [r.range for r in hub.asked(digest)][:2] == [None, f"bytes={10 << 20}-"]


def test_cancelling_keeps_what_arrived(hub, cache):
    class Stop(OSError):
        """As the host's own exception; even an OSError, which the client might swallow."""

    def stop(done: int, total: int, name: str) -> None:
        if done > 15 << 20:
            raise Stop("cancelled by the user")

    with pytest.raises(Stop, match="by the user"):
        fetch(BASE, ["transformer"], on_progress=stop)
    assert partial(cache).stat().st_size == 10 << 20
    assert_same(fetch(BASE, ["transformer"]))
    assert hub.asked(sha256(chroma_files()[SHARD]))[-1].range == f"bytes={10 << 20}-"


def test_a_gated_repository_says_to_set_the_token(hub, monkeypatch):
    hub.token = "hf_right"
    with pytest.raises(ModelFileError, match="401.*HF_TOKEN") as caught:
        fetch(BASE, ["vae"])
    assert LOCAL in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert_same(fetch(BASE, ["vae"]), ["vae/diffusion_pytorch_model.safetensors"])


def test_no_secret_is_told_logged_or_kept(hub, cache, monkeypatch, caplog, capfd):
    """Neither a token, refused or not, nor the password of a mirror that does not answer."""
    caplog.set_level(logging.DEBUG)
    wrong, right = "hf_wrongwrongwrong", "hf_rightrightright"
    hub.token = right
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(ModelFileError, match="401") as refused:
        fetch(BASE, ["vae"])
    monkeypatch.setenv("HF_TOKEN", right)
    folder = fetch(BASE, ["vae"])
    assert {request.token for request in hub.log} >= {f"Bearer {wrong}", f"Bearer {right}"}
    monkeypatch.setenv("HF_ENDPOINT", "http://me:password@127.0.0.1:9")
    with pytest.raises(ModelFileError, match="http://…@127.0.0.1:9") as unreachable:
        fetch(BASE, ["transformer"])
    texts = [str(refused.value), str(unreachable.value), caplog.text, *capfd.readouterr(), str(folder)]
    texts += [path.read_bytes().decode(errors="replace") for path in cache.rglob("*") if path.is_file()]
    assert not [text for text in texts if wrong in text or right in text or "me:password" in text]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("api/models", status=404, code="RevisionNotFound"), f"no revision '{BASE_COMMIT}'"),
        (Fault("api/models", status=404, code="RepoNotFound"), "no repository of that name.*HF_ENDPOINT"),
        (Fault("api/models", status=401), "401.*HF_TOKEN"),
        (Fault("vae/config.json", status=404, code="EntryNotFound"), "not there.*another revision"),
        (Fault("api/models", status=500), "status 500.*try again later"),
        (Fault("vae/config.json", status=503, times=9), "status 503.*is kept"),
        (Fault("api/models", body=b"<html>Log in to the hotel's network</html>"), "does not answer like the Hub"),
        (Fault("api/models", body=b'{"id": "x", "siblings": [{"rfilename": "a"}]}'), "lists no commit"),
    ],
)
def test_each_failure_says_what_happened_and_what_to_do(hub, fault, words):
    hub.faults = [fault]
    with pytest.raises(ModelFileError, match=words) as caught:
        fetch(BASE, ["vae"])
    assert LOCAL in str(caught.value) and REPOSITORY in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_and_impossible_revisions(hub, cache):
    with pytest.raises(ModelFileError, match="no revision 'v9'"):
        fetch(BASE, ["vae"], revision="v9")
    asked = len(hub.log)
    with pytest.raises(ModelFileError, match="not a revision"):
        fetch(BASE, ["vae"], revision="../../../elsewhere")
    assert len(hub.log) == asked and not cache.exists()


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.faults = [Fault("api/models", wait=30.0)]
    began = time.monotonic()
    with pytest.raises(ModelFileError, match="no connection.*Check the network"):
        fetch(BASE, ["vae"])
    assert time.monotonic() - began < 25


def test_no_network_names_local_files_and_what_the_cache_holds(hub, monkeypatch):
    hub.commits[OTHER] = chroma_files()
    fetch(BASE, ["vae"], revision=OTHER)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelFileError, match=rf"no connection.*holds revision {OTHER} complete") as caught:
        fetch(BASE, ["vae"])
    assert all(f"models/{name}" in str(caught.value) for name in ("diffusion_models", "text_encoders", "vae"))
    assert fetch(BASE, ["vae"], revision=OTHER).name == OTHER


def test_offline(hub, monkeypatch):
    fetch(BASE, ["vae"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.log)
    assert fetch(BASE, ["vae"]).name == BASE_COMMIT
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE is set.*Unset it"):
        fetch(BASE, ["vae", "tokenizer"])
    assert len(hub.log) == asked


def test_a_branch_is_looked_up_and_its_cached_commit_serves_without_network(hub, monkeypatch):
    assert fetch(BASE, ["vae"], revision="main").name == BASE_COMMIT
    hub.commits[OTHER] = chroma_files()
    hub.branches["main"] = OTHER
    weights = sha256(chroma_files()["vae/diffusion_pytorch_model.safetensors"])
    assert fetch(BASE, ["vae"], revision="main").name == OTHER
    assert len(hub.asked(weights)) == 1  # the same bytes in another commit are not fetched again
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(BASE, ["vae"], revision="main").name == OTHER
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE"):
        fetch(BASE, ["tokenizer"], revision="main")


def test_a_full_disk_is_seen_before_the_download(hub):
    hub.claimed[SHARD] = 1 << 60
    with pytest.raises(ModelFileError, match=rf"{1 << 30}\.\d GiB are needed, [\d.]+ GiB are free.*HF_HOME"):
        fetch(BASE, ["transformer"])
    assert not [r for r in hub.log if "resolve" in r.path]


def test_a_file_damaged_on_its_way_is_refused_and_fetched_anew(hub, cache):
    content = chroma_files()[SHARD]
    hub.faults = [Fault(sha256(content), body=content[:-1] + bytes([content[-1] ^ 1]))]
    with pytest.raises(ModelFileError, match="damaged.*checksum.*Try again"):
        fetch(BASE, ["transformer"])
    assert not partial(cache).exists()
    assert_same(fetch(BASE, ["transformer"]))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), lambda b: b"\xff" * len(b)])
def test_a_damaged_file_in_the_cache_is_replaced(hub, monkeypatch, damage):
    file = fetch(BASE, ["vae"]) / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE"):
        fetch(BASE, ["vae"])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert_same(fetch(BASE, ["vae"]), ["vae/diffusion_pytorch_model.safetensors"])


def test_a_repository_without_the_part(hub):
    hub.commits[BASE_COMMIT] = {n: c for n, c in chroma_files().items() if not n.startswith("vae")}
    with pytest.raises(ModelFileError, match="does not hold what is needed: vae"):
        fetch(BASE, ["vae"])


def test_two_at_once_download_a_file_once(hub):
    hub.pace = 50e6
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(fetch(BASE, ["transformer"]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 2
    assert_same(folders[0])
    assert [r.range for r in hub.asked(sha256(chroma_files()[SHARD]))] == [None]


def test_without_symbolic_links_nothing_lies_there_twice(hub, cache, monkeypatch):
    monkeypatch.setattr("chroma_core.loading.transfer.are_symlinks_supported", lambda cache: False)
    folder = fetch(BASE, ["transformer"])
    assert_same(folder)
    assert not (folder / SHARD).is_symlink()
    assert sum(p.stat().st_size > 1 << 20 for p in cache.rglob("*") if not p.is_symlink()) == 1


def test_a_branch_is_asked_for_once_and_means_one_commit(hub, cache):
    """The component cache asks the Hub what a branch means once, and keeps to that commit."""
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
