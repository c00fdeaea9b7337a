"""How much memory the arrays of a compiled program take at once, read from its text."""

import math
import re

ARRAY = re.compile(r"\b([a-z]+)(\d+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)", re.MULTILINE)
TILE = re.compile(r"T\((\d+),(\d+)\)")
SAME_MEMORY = ("bitcast", "get-tuple-element")
NOT_TEMPORARY = ("parameter", "constant", "tuple", *SAME_MEMORY)
FAST_MEMORY = "S(1)"


def array_bytes(types: str) -> int:
    """Returns the bytes of the arrays in a type, with the padding of their tiles.

    What lies in the chip's fast memory does not count.

    >>> array_bytes("(f32[8,128], bf16[4,64]{1,0:T(8,128)(2,1)}, bf16[9]{0:T(256)S(1)})")
    6144
    """
    total = 0
    for _, bits, dims, order, properties in ARRAY.findall(types):
        if FAST_MEMORY in properties:
            continue
        shape = [int(n) for n in dims.split(",") if n]
        tile = TILE.search(properties)
        minor = [int(n) for n in order.split(",") if n][:2]
        if tile and len(minor) == 2:
            for axis, size in zip(minor, (int(tile[2]), int(tile[1])), strict=True):
                shape[axis] = -(-shape[axis] // size) * size
        total += math.prod(shape) * int(bits) // 8
    return total


def alive_at_once(text: str) -> int:
    """Returns the most bytes of temporary arrays that are alive at the same time.

    It goes through the operations in the order in which the compiled program runs them; an array
    is alive from its operation to its last use. What the program returns has memory of its own, and
    does not count. The compiler may ask for a little less, where an operation overwrites its input,
    and for more, where it leaves room between arrays.

    Args:
      text: of a compiled program, `compiled.as_text()`.

    >>> alive_at_once('''
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   %a = f32[4]{0} add(%x, %x)
    ...   %b = f32[4]{0} add(%a, %a)
    ...   %c = f32[4]{0} bitcast(%a)
    ...   %d = f32[4]{0} add(%b, %c)
    ...   ROOT %e = (f32[4]{0}) tuple(%d)
    ... }
    ... ''')
    32
    """
    entry = text[text.index("ENTRY ") :].split("\n}")[0]
    operations = INSTRUCTION.findall(entry)
    owner: dict[str, str] = {}
    last_use: dict[str, int] = {}
    for step, (name, _, operation, rest) in enumerate(operations):
        used = [owner.get(n, n) for n in re.findall(r"%([\w.-]+)", rest.split(", calls=")[0])]
        if used and (operation in SAME_MEMORY or operation.endswith("-done")):
            owner[name] = used[0]
        for argument in used:
            last_use[argument] = step
    # The last operation is what the program returns.
    returned = {name for name, step in last_use.items() if step == len(operations) - 1}
    ends: dict[int, list[str]] = {}
    for name, step in last_use.items():
        ends.setdefault(step, []).append(name)
    alive: dict[str, int] = {}
    total = most = 0
    for step, (name, types, operation, _) in enumerate(operations):
        is_new = operation not in NOT_TEMPORARY and name not in owner
        if is_new and name in last_use and name not in returned:
            alive[name] = array_bytes(types)
            total += alive[name]
        most = max(most, total)
        for ended in ends.get(step, ()):
            total -= alive.pop(ended, 0)
    return most
