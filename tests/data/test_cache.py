"""Entries on disk: whole or absent, bounded, never taken from whoever uses them, right whoever writes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.data.cache import Store, cached

FORK = multiprocessing.get_context("fork")


def entry(i: int) -> dict[str, Tensor]:
    """A thousand bytes and a bit."""
    return {"x": torch.full((250,), float(i))}


def key(i: int) -> str:
    """A key, spread over folders."""
    return f"thing-{i:04x}"


def put(store: Store, *numbers: int) -> None:
    """Some entries."""
    store.put({key(i): entry(i) for i in numbers})


def there(store: Store, n: int) -> list[int]:
    """Which of the first n are kept."""
    return [i for i in range(n) if store.has(key(i))]


def age(store: Store, *numbers: int) -> None:
    """Let entries have been used long ago, the first longest."""
    for k, i in enumerate(numbers):
        os.utime(store._path(key(i)), (1000 + k, 1000 + k))


def test_what_is_put_is_got_again_by_any_process_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path, 1.0)
    assert store.get(key(0)) is None and not store.has(key(0))
    store.put({"both-00": {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}})
    found = Store(tmp_path, 1.0).get("both-00")
    assert found.keys() == {"a", "b"} and found["b"].dtype == torch.bfloat16
    assert torch.equal(found["a"], torch.arange(3)) and torch.equal(found["b"], torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("place", [3, 40, -1, None])
def test_a_damaged_entry_counts_as_absent_and_is_said(tmp_path: Path, place: int | None) -> None:
    """Wherever a bit is flipped, in the numbers too, and if the end is missing."""
    store = Store(tmp_path, 1.0)
    put(store, 1)
    path = store._path(key(1))
    raw = bytearray(path.read_bytes())
    if place is None:
        del raw[-7:]
    else:
        raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged .* and is made anew"):
        assert store.get(key(1)) is None
    put(store, 1)
    assert torch.equal(store.get(key(1))["x"], entry(1)["x"])


def test_beyond_the_bound_the_oldest_use_leaves(tmp_path: Path) -> None:
    first = Store(tmp_path, 1.0)
    put(first, *range(8))
    size = first.bytes() / 8
    age(first, 3, 0, 1, 2, 4, 5, 6, 7)
    first.close()
    store = Store(tmp_path, 8.5 * size / 1e9)
    assert torch.equal(store.get(key(3))["x"], entry(3)["x"])  # used, so it stays, old as it was
    put(store, 8)
    assert 3 in there(store, 9) and 8 in there(store, 9)
    assert 0 not in there(store, 9) and 7 in there(store, 9)
    assert store.bytes() <= 8.5 * size
    assert store.bytes() == sum(p.stat().st_size for p in tmp_path.rglob("*.entry"))


def test_nothing_leaves_that_a_living_process_has_used(tmp_path: Path) -> None:
    other = Store(tmp_path, 1.0)
    put(other, 0, 1)
    size = other.bytes() / 2
    store = Store(tmp_path, 2.5 * size / 1e9)
    with pytest.warns(UserWarning, match=r"GB that are all in use; raise data.cache_gb") as said:
        put(store, 2, 3)
        put(store, 4)
    assert there(store, 5) == [0, 1] and len(said) == 1
    other.close()  # it ends
    later = Store(tmp_path, 2.5 * size / 1e9)
    store.close()
    age(later, 1, 0)
    put(later, 5)
    assert there(later, 6) == [0, 5]


def test_the_lease_of_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    def fill_and_die() -> None:
        put(Store(tmp_path, 1.0), 0)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=fill_and_die)
    process.start()
    process.join()
    time.sleep(0.02)
    store = Store(tmp_path, 1500 / 1e9)
    assert there(store, 1) == [0] and len(list(tmp_path.rglob("*.lease"))) == 2
    put(store, 1)
    assert there(store, 2) == [1] and len(list(tmp_path.rglob("*.lease"))) == 1


def test_a_killed_write_leaves_nothing_and_is_cleared_away(tmp_path: Path) -> None:
    store = Store(tmp_path, 1.0)
    put(store, 0)
    part = store._path(key(1)).with_suffix(".part")
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"half")
    (store.folder / ".total").write_text("17")  # killed between the two
    again = Store(tmp_path, 1.0)
    assert again.get(key(1)) is None and not part.exists()
    assert again.bytes() == store._path(key(0)).stat().st_size


def fill(folder: Path) -> None:
    """A hundred entries into room for fifty or so, reading whatever is there."""
    warnings.simplefilter("ignore")
    store = Store(folder, 60_000 / 1e9)
    for i in range(100):
        found = store.get(key(i))
        if found is None:
            put(store, i)
        elif not torch.equal(found["x"], entry(i)["x"]):
            os._exit(7)


def test_two_processes_that_fill_one_cache_make_one_right_cache(tmp_path: Path) -> None:
    running = [FORK.Process(target=fill, args=(tmp_path,)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    store = Store(tmp_path, 1.0)
    sizes = [p.stat().st_size for p in tmp_path.rglob("*.entry")]
    assert 10 < len(sizes) < 100 and sum(sizes) <= 60_000 and store.bytes() == sum(sizes)
    assert not list(tmp_path.rglob("*.part"))
    for i in there(store, 100):
        assert torch.equal(store.get(key(i))["x"], entry(i)["x"])


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, 1.0)
    put(store, 0)
    known = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".part":
            known(path, data[:10])
            raise OSError(28, "No space left on device")
        return known(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"cannot be written to .*No space left"):
        put(store, 1)
    assert there(store, 2) == [0] and torch.equal(store.get(key(0))["x"], entry(0)["x"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache \S*file: cannot be written to .* name another with data.cache"):
        Store(tmp_path / "file", 1.0)


def test_a_table_is_made_by_one_of_two_processes_while_the_other_waits(tmp_path: Path) -> None:
    def make() -> dict[str, Tensor]:
        with (tmp_path / "made").open("a") as file:
            file.write("once\n")
        time.sleep(0.5)
        return {"x": torch.arange(5)}

    def ask() -> None:
        os._exit(0 if cached(tmp_path, "pairs", "k", ("x",), make)["x"].tolist() == [0, 1, 2, 3, 4] else 7)

    running = [FORK.Process(target=ask) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert (tmp_path / "made").read_text() == "once\n"
    assert cached(tmp_path, "pairs", "k", ("x",), lambda: pytest.fail("again"))["x"].tolist() == [0, 1, 2, 3, 4]
