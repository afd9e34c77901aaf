"""Files of torch.save damaged at random, and made to call things: nothing is executed, and errors have three lines.

The files are read in a separate process with an audit hook, which sees every import, every call of eval, exec and
os.system, every process that is started, and every file that is opened for writing.
"""

import json
import subprocess
from pathlib import Path

import pytest
from helpers import THOROUGH, run_command

RECORDED = Path(__file__).resolve().parents[1] / "weights" / "torch_files"

_PROGRAM = r"""
import codecs, io, os, pathlib, pickletools, random, resource, sys, zipfile
from vit_jax.errors import UserError
from vit_jax.weights import files

recorded = [path for path in sorted(pathlib.Path(sys.argv[1]).glob("*.p*[ht]")) if "without" not in path.name]
folder, count = pathlib.Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(int(sys.argv[4]))
OPERATIONS = [operation.code.encode("latin-1") for operation in pickletools.opcodes]
CALLS = ["os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "builtins __import__"]
CALLS += ["builtins open", "subprocess Popen", "runpy run_path", "torch.hub load", "torch.load x", "pickle loads"]
CALLS += ["operator attrgetter", "functools partial", "torch.utils.collect_env run", "pathlib Path.touch"]
CODE = f"open({str(folder / 'canary')!r}, 'w')"
ARGUMENTS = [f"touch {folder / 'canary'}", CODE, f"__import__('os').system('touch {folder / 'canary'}')"]

def damaged(data):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        kind, at = draw.randrange(7), draw.randrange(max(len(data), 1))
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[draw.randrange(max(len(data), 1)) :][: draw.randrange(1, 80)]
        elif kind == 4:
            data[at : at + 8] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * draw.choice([1, 2, 4, 8])
        elif kind == 5:
            data[at:at] = draw.choice(OPERATIONS)
        elif data:
            data[at : at + 1] = draw.choice(OPERATIONS)
    return bytes(data)

def called(data):
    # Some name in the pickle is another one, or a call is inserted between two operations.
    positions, name = [], draw.choice(CALLS)
    try:
        for operation, argument, at in pickletools.genops(io.BytesIO(data)):
            positions.append((at, operation, argument))
    except ValueError:
        pass
    names = [(at, argument) for at, operation, argument in positions if operation.name == "GLOBAL"]
    if names and draw.randrange(2):
        at, argument = draw.choice(names)
        old = b"c" + argument.replace(" ", "\n").encode() + b"\n"
        new = b"c" + name.replace(" ", "\n").encode() + b"\n"
        return data[:at] + new + data[at + len(old) :]
    at = draw.choice(positions)[0]
    text = draw.choice(ARGUMENTS).encode()
    text = b"X" + len(text).to_bytes(4, "little") + text
    module, function = (b"X" + len(part).to_bytes(4, "little") + part.encode() for part in name.split(" "))
    inst = b"(" + text + b"i" + name.replace(" ", "\n").encode() + b"\n0"
    named = b"c" + name.replace(" ", "\n").encode() + b"\n"
    ways = [named + text + b"\x85R0", named + text + b"\x85\x810", named + text + b"\x85}\x920", inst]
    ways += [module + function + b"\x93" + text + b"\x85R0", b"(" + named + text + b"o0", named + b")R" + text + b"b0"]
    ways += [named + text + b"\x85Q0", b"P" + CODE.encode() + b"\n0", named + b"}X\1\0\0\0a" + named + b"sb0"]
    return data[:at] + draw.choice(ways) + data[at:]

def swapped(data):
    # Operations are left out, repeated or exchanged.
    parts, last = [], 0
    try:
        for _, _, at in pickletools.genops(io.BytesIO(data)):
            parts.append(data[last:at])
            last = at
    except ValueError:
        return data
    for _ in range(draw.choice([1, 2, 5])):
        one, other = draw.randrange(len(parts)), draw.randrange(len(parts))
        kind = draw.randrange(3)
        if kind == 0:
            parts[one], parts[other] = parts[other], parts[one]
        else:
            parts[one] = b"" if kind == 1 else parts[one] + parts[other]
    return b"".join(parts) + data[last:]

def mutated(data):
    change = draw.choice([damaged, called, swapped])
    if data[:2] != b"PK" or (change is damaged and draw.randrange(2)):
        return change(data)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(stream, "w", draw.choice([0, 0, 8])) as copy:
        for name in archive.namelist():
            inside = archive.read(name)
            copy.writestr(name, change(inside) if name.endswith("data.pkl") else inside)
    return stream.getvalue()

def read(path):
    try:
        stored = files.open_file(path)
        for name in stored.arrays:
            stored.arrays[name]
    except UserError as error:
        lines = str(error).splitlines()
        assert len(lines) <= 3 and "Traceback" not in lines[0] and str(path) in lines[0], error
        assert all(line.isprintable() for line in lines), lines
        assert "not enough memory" not in str(error) and "bytes of memory" not in str(error), error
        return "refused"
    return "loaded"

def memory(key):
    return next(int(l.split()[1]) for l in pathlib.Path("/proc/self/status").read_text().splitlines() if key in l)

FORBIDDEN = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.")
FORBIDDEN += ("pickle.", "ctypes.", "marshal.", "shutil.", "os.remove", "os.rename", "os.mkdir", "code.", "object.")
watching, seen = False, []

def hook(event, arguments):
    writes = event == "open" and (arguments[1] is None or set("wax+") & set(str(arguments[1])))
    if watching and (writes or event.startswith(FORBIDDEN)):
        seen.append(f"{event} {arguments}"[:200])

codecs.lookup("raw_unicode_escape")  # pickletools uses it for some text, and Python imports it at the first use
contents = [path.read_bytes() for path in recorded]
for path in recorded:
    read(path)
target, counts = folder / "a.pth", {}
target.write_bytes(damaged(contents[0]))
sys.addaudithook(hook)
with target.open("r+b", buffering=0) as file:
    for number in range(count + 200):
        if number == 200:  # what is imported at the first use is imported now
            before = memory("VmRSS")
            limit = memory("VmSize") * 1024 + 10**9
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        data = mutated(draw.choice(contents))
        file.seek(0)
        file.truncate()
        file.write(data)
        watching = number >= 200
        try:
            result = read(target)
        except BaseException:
            (folder / "wrong.pth").write_bytes(data)
            raise
        finally:
            watching = False
        counts[result] = counts.get(result, 0) + (number >= 200)
print(__import__("json").dumps([counts, seen[:5], memory("VmHWM") - before, (folder / "canary").exists()]))
"""


@pytest.mark.parametrize("count", [200, pytest.param(10_000 if THOROUGH else 2_000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of memory")
def test_nothing_is_executed(tmp_path, count):
    output = run_command(_PROGRAM, RECORDED, tmp_path, count, count, stderr=subprocess.PIPE)
    counts, seen, grown, canary = json.loads(output.splitlines()[-1])
    print(counts, grown)
    assert not seen and not canary
    assert sum(counts.values()) == count and set(counts) == {"loaded", "refused"}
    assert grown < 100_000  # kB; the files have at most 9
