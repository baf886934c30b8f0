"""Checkpoints are atomic: an interrupted save leaves none. Nothing unverified is read."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from d2v_fast import checkpoint
from d2v_fast.checkpoint import Checkpoint, CheckpointError, Checkpoints, write
from tests.runs import CONTEXT

STATE = json.dumps({"step": 1, "settings": {"train.steps": 4}})


def tensors(step, size=1000):
    return {
        "student": {"a.weight": torch.full((size,), float(step)), "b": torch.arange(3)},
        "teacher": {"teacher.step": torch.tensor(step)},
        "rng": {"0.cpu": torch.get_rng_state()},
    }


def written(folder, *steps, **sizes):
    for step in steps:
        write(folder, step, tensors(step, **sizes), json.dumps({"step": step}))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_checkpoint_reads_back_identical(tmp_path):
    written(tmp_path, 7)
    found = Checkpoint(tmp_path / "step-7")
    assert found.step == 7
    for name, values in tensors(7).items():
        read = found.tensors(name)
        assert read.keys() == values.keys()
        assert all(torch.equal(read[n], v) and read[n].dtype == v.dtype and read[n].shape == v.shape for n, v in values.items())
    assert names(tmp_path) == ["step-7"]
    # The manifest agrees with `sha256sum`.
    sums = subprocess.run(["sha256sum", *found.files], cwd=found.folder, capture_output=True, text=True, check=True).stdout
    assert sums == "".join(f"{found.files[name]['sha256']}  {name}\n" for name in found.files)


def test_no_pickle_is_written(tmp_path):
    written(tmp_path, 1)
    for file in (tmp_path / "step-1").iterdir():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError)):
            pickle.loads(file.read_bytes())
        assert file.suffix in (".safetensors", ".json")


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """Sync order: files, folder, rename, parent folder. Otherwise a power cut may leave a name without content."""
    done, opened = [], {}
    real_open, real_sync, real_replace = os.open, os.fsync, os.replace

    def open_(path, *args, **kwargs):
        handle = real_open(path, *args, **kwargs)
        opened[handle] = Path(path).name
        return handle

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(opened[handle]) or real_sync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or real_replace(a, b))
    written(tmp_path, 5)
    files = ["rng.safetensors", "state.json", "student.safetensors", "teacher.safetensors"]
    assert done == [*files, "manifest.json", "step-5.tmp", "rename", tmp_path.name]


def test_files_are_flushed_on_windows(tmp_path, monkeypatch):
    """Windows cannot open folders, and flushes only files that are open for writing."""
    done, opened = [], {}
    real_open, real_sync = os.open, os.fsync

    def open_(path, flags, *args, **kwargs):
        if Path(path).is_dir():
            raise PermissionError(path)
        handle = real_open(path, flags, *args, **kwargs)
        opened[handle] = Path(path).name, flags
        return handle

    def fsync(handle):
        name, flags = opened[handle]
        if not flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EBADF, name)
        done.append(name)
        real_sync(handle)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    written(tmp_path, 5)
    assert done == ["rng.safetensors", "state.json", "student.safetensors", "teacher.safetensors", "manifest.json"]


def _die_at(number, after):
    """Kill this process before or after the n-th disk operation."""
    count = 0

    def counted(function):
        def touch(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        return touch

    disk = {os: ("fsync", "replace", "rename", "unlink"), Path: ("mkdir", "write_text"), checkpoint: ("save_file",)}
    for place, name in ((place, name) for place, names in disk.items() for name in names):
        setattr(place, name, counted(getattr(place, name)))


def _write_and_die(folder, number, after):
    torch.set_num_threads(1)
    _die_at(number, after)
    found = Checkpoints(Path(folder), keep_last=1)
    found.save(2, tensors(2), {})
    found.wait()


def test_killed_at_any_point_of_a_save_one_intact_checkpoint_remains(tmp_path):
    seen = set()
    for number in range(1, 40):
        codes = []
        for after in (False, True):
            folder = written(tmp_path / f"{number}-{after}", 1)
            process = CONTEXT.Process(target=_write_and_die, args=(str(folder), number, after))
            process.start()
            process.join(60)
            codes.append(process.exitcode)
            found = Checkpoints(folder, 1).newest()
            seen.add((found.step, *names(folder)))
            assert all(Checkpoint(folder / name).step for name in names(folder) if not name.endswith(".tmp"))
            assert torch.equal(found.tensors("student")["a.weight"], torch.full((1000,), float(found.step)))
            written(folder, 3)  # the next save cleans up
            assert not list(folder.glob("*.tmp"))
        if codes == [0, 0]:
            break
        assert codes == [-signal.SIGKILL] * 2
    else:
        pytest.fail("no save completed")
    assert {(1, "step-1", "step-2.tmp"), (2, "step-1", "step-2"), (2, "step-2")} <= seen and number > 12


@pytest.mark.parametrize("name", ["student.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(name, how, tmp_path, caplog):
    written(tmp_path, 1, 2)
    file = tmp_path / "step-2" / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"truncated": content[:-1], "flipped": content, "empty": b""}[how])
    checkpoints = Checkpoints(tmp_path, 5)
    assert checkpoints.newest().step == 1
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("skipped a checkpoint:") and str(tmp_path / "step-2") in said[0]
    # The next save replaces it.
    checkpoints.save(2, tensors(2), {})
    checkpoints.wait()
    assert Checkpoint(tmp_path / "step-2").step == 2 and names(tmp_path) == ["step-1", "step-2"]


def test_any_flipped_bit_is_detected(tmp_path):
    written(tmp_path, 1, size=4)
    file = tmp_path / "step-1" / "student.safetensors"
    content = file.read_bytes()
    for position in range(0, 8 * len(content), 37):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"student\.safetensors is damaged"):
            Checkpoint(tmp_path / "step-1")


@pytest.mark.parametrize(
    "read, reason",
    [
        (lambda state: state["ranks"], "KeyError: 'ranks'"),
        (lambda state: [][0], "IndexError: "),
        (lambda state: state["step"]["x"], "TypeError: "),
        (lambda state: int("x"), "ValueError: "),
        (lambda state: torch.set_rng_state(torch.zeros(3, dtype=torch.uint8)), "RuntimeError: "),
    ],
)
def test_errors_while_reading_a_state_name_the_checkpoint(read, reason, tmp_path):
    written(tmp_path, 1)
    checkpoint = Checkpoint(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=f"step-1: not a valid version 3 checkpoint: {reason}"):
        with checkpoint.reading():
            read(checkpoint.state)
    with pytest.raises(CheckpointError, match="KeyError: 'settings'"):
        checkpoint.compare("settings", {})


def test_newest_raises_without_an_intact_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"none: no checkpoint$"):
        Checkpoints(tmp_path / "none", 1).newest()
    written(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step}" / "teacher.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is intact"):
        Checkpoints(tmp_path, 1).newest()


@pytest.mark.parametrize("keep_last", [1, 2, 5, 9])
def test_keep_last(keep_last, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in range(1, 8):
        checkpoints.save(step, tensors(step), {})
        checkpoints.wait()
        assert names(tmp_path) == [f"step-{i}" for i in range(max(1, step + 1 - keep_last), step + 1)]


def test_older_checkpoints_are_deleted_only_after_an_intact_save(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (9, 10, 11):
        checkpoints.save(step, tensors(step), {})
        checkpoints.wait()
    assert names(tmp_path) == ["step-10", "step-11"]
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: "wrong" if file.parent.name == "step-12" else "right")
    checkpoints.save(12, tensors(12), {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-10", "step-11"] and "step 12 could not be written" in caplog.text
    assert "is damaged" in checkpoints.failed


def test_later_checkpoints_than_the_resumed_one_are_deleted(tmp_path):
    written(tmp_path, 4, 8)
    (tmp_path / "step-8" / "state.json").unlink()
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    assert checkpoints.newest().step == 4
    checkpoints.save(6, tensors(6), {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-4", "step-6"] and checkpoints.newest().step == 6


def test_save_copies_the_state_at_once(tmp_path, monkeypatch):
    """Later changes do not reach the file; a thread waits for the disk; copy buffers are reused."""
    allowed = threading.Event()
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: allowed.wait(60) and real(*args))
    checkpoints = Checkpoints(tmp_path, 2)
    values = tensors(1)
    checkpoints.reserve(values)
    checkpoints.wait()
    address = checkpoints._copies["student"]["a.weight"].data_ptr()
    checkpoints.save(1, values, {})
    assert checkpoints.busy and not (tmp_path / "step-1").exists()
    values["student"]["a.weight"].fill_(99)
    allowed.set()
    checkpoints.wait()
    assert not checkpoints.busy
    assert torch.equal(Checkpoint(tmp_path / "step-1").tensors("student")["a.weight"], torch.ones(1000))
    assert checkpoints._copies["student"]["a.weight"].data_ptr() == address


def test_a_full_disk_loses_that_checkpoint_only_and_leaves_no_temporary_files(tmp_path, monkeypatch, caplog):
    written(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        checkpoints.save(2, tensors(2), {})
        checkpoints.wait()
    assert "step 2 could not be written: [Errno 28] No space left on device; training continues without it" in caplog.text
    assert names(tmp_path) == ["step-1"]
    checkpoints.save(3, tensors(3), {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-3"] and checkpoints.failed is None


def save_parts(ranks, step):
    """Save on two ranks, each of which has half of the student."""
    ranks[0].begin(step)
    for rank, each in enumerate(ranks):
        half = {"a": torch.full((2, 3), float(step + rank))}
        offsets = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [2 * rank, 0]}})}
        each.save_part(step, rank, {f"student-{rank}": half}, {f"student-{rank}": offsets}, None if rank else {"x": 1})
    return [each.part() for each in ranks]


def test_parts_of_two_ranks_are_one_checkpoint_once_both_are_written(tmp_path):
    ranks = [Checkpoints(tmp_path, keep_last=1) for _ in range(2)]
    for step in (1, 2):
        parts = save_parts(ranks, step)
        assert names(tmp_path) == [f"step-{step - 1}"] * (step > 1) + [f"step-{step}.tmp"]
        assert all(each.part() is None for each in ranks)  # once
        ranks[0].finish(parts)
        ranks[0].wait()
        assert names(tmp_path) == [f"step-{step}"] and ranks[0].failed is None
    found = Checkpoint(tmp_path / "step-2")
    assert found.state == {"step": 2, "x": 1} and found.step == ranks[0].newest().step
    assert list(found.files) == ["state.json", "student-0.safetensors", "student-1.safetensors"]
    assert torch.equal(found.tensors("student")["a"], torch.tensor([2.0, 2, 3, 3]).unsqueeze(1).expand(4, 3))
    sums = subprocess.run(["sha256sum", *found.files], cwd=found.folder, capture_output=True, text=True, check=True).stdout
    assert sums == "".join(f"{found.files[name]['sha256']}  {name}\n" for name in found.files)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_cannot_be_written_loses_that_checkpoint_only(rank, tmp_path, monkeypatch, caplog):
    written(tmp_path, 1)
    ranks = [Checkpoints(tmp_path, keep_last=1) for _ in range(2)]
    real = checkpoint.save_file

    def full(values, path, metadata):
        if path.name == f"student-{rank}.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(values, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        parts = save_parts(ranks, 2)
    ranks[0].finish(parts)
    ranks[0].wait()
    assert f"step 2 could not be written: rank {rank}: [Errno 28] No space left on device; training" in caplog.text
    assert names(tmp_path) == ["step-1"]
    ranks[0].finish(save_parts(ranks, 3))
    ranks[0].wait()
    assert names(tmp_path) == ["step-3"] and ranks[0].failed is None


def test_a_folder_that_cannot_be_made_is_the_reason_of_all_parts(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ranks = [Checkpoints(tmp_path / "file" / "checkpoints", keep_last=1) for _ in range(2)]
    ranks[0].finish(save_parts(ranks, 2))
    ranks[0].wait()
    assert "could not be written: rank 0: [Errno 20] Not a directory" in caplog.text and "; rank 1: [Errno 20]" in caplog.text


def test_checksums_can_be_left_to_another_rank(tmp_path):
    written(tmp_path, 1)
    file = tmp_path / "step-1" / "teacher.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert Checkpoint(tmp_path / "step-1", checksums=False).step == 1
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        Checkpoint(tmp_path / "step-1", checksums=False)


class TestHostile:
    """Checkpoints from untrusted sources are refused, and nothing outside their folder is read."""

    def altered(self, folder, **manifest):
        written(folder, 1)
        file = folder / "step-1" / "manifest.json"
        content = json.loads(file.read_text())
        content |= manifest
        file.write_text(json.dumps(content))
        return folder / "step-1"

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "~/x", ".hidden"])
    def test_a_manifest_with_paths_outside_the_folder(self, name, tmp_path, monkeypatch):
        (tmp_path / "secret").write_text("secret")
        folder = self.altered(tmp_path, files={name: {"size": 6, "sha256": "0"}})
        monkeypatch.setattr(checkpoint, "_sha256", lambda file: pytest.fail(f"{file} was read"))
        with pytest.raises(CheckpointError, match="may be outside the folder"):
            Checkpoint(folder)

    def test_a_symlink_out_of_the_folder(self, tmp_path):
        written(tmp_path, 1)
        file = tmp_path / "step-1" / "student.safetensors"
        os.rename(file, tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", file)
        with pytest.raises(CheckpointError, match="may be outside the folder"):
            Checkpoint(tmp_path / "step-1")

    @pytest.mark.parametrize(
        "content", ["[]", "null", "7", '{"version": 99, "files": {}}', '{"version": 1, "files": []}', "[" * 100_000, "\0", "{"]
    )
    def test_an_invalid_manifest(self, content, tmp_path):
        written(tmp_path, 1)
        (tmp_path / "step-1" / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            Checkpoint(tmp_path / "step-1")

    @pytest.mark.parametrize("entry", [None, 5, {}, {"size": "6"}, {"size": None, "sha256": None}])
    def test_an_invalid_manifest_entry(self, entry, tmp_path):
        with pytest.raises(CheckpointError, match=r"state\.json (cannot be checked: |has \d+ bytes instead of None)"):
            Checkpoint(self.altered(tmp_path, files={"state.json": entry}))

    def test_a_pickle_in_place_of_tensors(self, tmp_path):
        """The checksum is right, but only safetensors are loaded."""

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        written(tmp_path, 1)
        file = tmp_path / "step-1" / "student.safetensors"
        file.write_bytes(pickle.dumps(Bomb()))
        manifest = tmp_path / "step-1" / "manifest.json"
        content = json.loads(manifest.read_text())
        content["files"][file.name] = {"size": file.stat().st_size, "sha256": checkpoint._sha256(file)}
        manifest.write_text(json.dumps(content))
        found = Checkpoint(tmp_path / "step-1")
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            found.tensors("student")
        with pytest.raises(CheckpointError, match="holds no optimizer"):
            found.tensors("optimizer")
        assert not (tmp_path / "exploded").exists()


def test_differences_are_printed():
    found = Checkpoint.__new__(Checkpoint)
    found.folder, found.state = Path("run/step-1"), {"settings": {"a.b": 1, "a.c": {"d": 2}, "e": [1, 2], "gone": 0}}
    found.compare("settings", {"a.b": 1, "a.c": {"d": 2}, "e": [1, 2], "gone": 0})
    now = {"a.b": 2, "a.c": {"d": 3}, "e": [1, 2], "new": None}
    with pytest.raises(CheckpointError) as error:
        found.compare("settings", now, ["new"])
    assert str(error.value).splitlines()[1:] == ["  a.b: was 1, is 2", "  a.c.d: was 2, is 3", "  gone: was 0, is nothing"]
    for allowed in (["a", "new", "gone"], ["a.b", "a.c", "new", "gone"], ["a.b", "a.c.d", "new", "gone"]):
        found.compare("settings", now, allowed)
    with pytest.raises(CheckpointError, match=r"a\.b: was 1"):
        found.compare("settings", now, ["a.bb", "a.c", "new", "gone"])
    a, b = torch.ones(2), torch.ones(2, 3)
    with pytest.raises(CheckpointError, match=r"w: was \[2\] torch\.float32, is \[2, 3\] torch\.float32\n  t: was nothing, is"):
        found.compare_shapes({"w": a, "same": a}, {"w": b, "same": a, "t": a})
