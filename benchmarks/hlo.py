"""What a compiled program's text says: its operations by kind, and what each kernel moves and computes.

An operation belongs to the first of KINDS that its text or its place in our code says; to matrix products
a fusion that holds one. Loops and calls count by what is inside them.
"""

import dataclasses
import math
import re
from collections import defaultdict

PRODUCTS = "matrix products"
COLLECTIVE = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
KINDS = {  # kind: what is looked for in an operation's line and the computation that it calls
    "between devices": rf" ({COLLECTIVE})(-start)?\(",
    "augmentation": r"/augmentation/",
    "optimizer": r"/optimizer/",
    "attention, position": r"[/(]position[/)]",
    "attention, content": r"[/(]content[/)]",
    PRODUCTS: r" dot\(|gemm|cublas|/dot_general",
    "copies and transpositions": r" (copy|transpose|copy-start|copy-done)\(",
    "loop: what is kept, written and read": r"dynamic[-_]update[-_]slice|dynamic[-_]slice",
    "the rest: norms, GELU, softmax of the loss, sums": r"",
}
LOOP = r" (while|call|conditional)\("  # what is inside them counts
BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, f64=8, s64=8, u64=8)
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}


@dataclasses.dataclass
class Operation:
    name: str
    shape: str  # "bf16[8,196]{1,0}", or several in brackets
    opcode: str
    operands: list  # names
    rest: str  # what follows the operands
    line: str
    root: bool

    def called(self, attribute):
        """Name of the computation that an attribute (calls, body, to_apply) names, or None."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]


def computations(text):
    """{computation: {operation: Operation}} of a program's text; the first to run is "ENTRY"."""
    found = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = found.setdefault("ENTRY" if begins[1] else begins[2], {})
        elif parts := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            root, name, shape, opcode, rest = parts.groups()
            end, depth = 0, 1
            while depth:  # the bracket that closes the operands
                depth += {"(": 1, ")": -1}.get(rest[end], 0)
                end += 1
            operands = re.findall(r"%([\w.\-]+)", rest[: end - 1])
            inside[name] = Operation(name, shape, opcode, operands, rest[end:], line, bool(root))
    return found


def _kind(operation, fused, names=tuple(KINDS)):
    """Kind, of those named, of an operation with those of the computation that it calls."""
    result = "\n".join([operation.line, *(each.line for each in fused if each.root)])
    whole = "\n".join([operation.line, *(each.line for each in fused)])
    return next(name for name in names if re.search(KINDS[name], whole if name == PRODUCTS else result))


def kinds(text):
    """{operation: kind, or None of a loop} of all operations of a program's text."""
    found = computations(text)
    return {
        name: None
        if re.search(LOOP, each.line)
        else _kind(each, found.get(each.called("calls"), {}).values())
        for inside in found.values()
        for name, each in inside.items()
    }


@dataclasses.dataclass
class Kernel:
    name: str
    kind: str
    opcode: str
    times: int  # in a step: a loop's kernels run once a turn
    moved: int  # bytes read and written
    flops: int  # of its matrix products


def kernels(text):
    """All kernels of a program for a GPU: what a step runs, reads, writes and multiplies.

    A kernel that takes a slice of an array reads the slice, one that updates a slice in place writes it. A
    loop whose length the text does not say (of JAX's random numbers) counts once.
    """
    found = computations(text)
    result = []

    def walk(computation, times):
        for each in found[computation].values():
            if each.opcode == "while":
                turns = re.search(r"known_trip_count\D*(\d+)", each.rest)
                walk(each.called("body"), times * int(turns[1] if turns else 1))
            elif each.opcode == "call":
                walk(each.called("to_apply"), times)
            elif each.opcode not in FREE and not each.opcode.endswith("-done"):
                fused = found.get(each.called("calls"), {})
                moved = _moved_by_fusion(fused) if fused else _moved(each, found[computation])
                flops = _flops(each, found[computation], fused)
                names = [name for name in KINDS if flops or name != PRODUCTS]
                kind = _kind(each, fused.values(), names)
                opcode = each.opcode.removesuffix("-start")
                result.append(Kernel(each.name, kind, opcode, times, moved, flops))

    walk("ENTRY", 1)
    return result


def _size(shape):
    """Bytes of one array or of several."""
    return sum(
        BYTES.get(kind, 0) * math.prod(map(int, filter(None, sizes.split(","))))
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def _dimensions(shape):
    return [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]


def _flops(kernel, inside, fused):
    """Of the matrix products of a kernel: a fusion, or a call of cuBLAS or of cuDNN's attention."""
    if "__cublas" in kernel.rest:
        return _product_flops(kernel, inside)
    if "__cudnn$fmha" in kernel.rest:  # two products of q, k and v forward, five backward
        maps = re.search(r'"intermediate_tensor_shape".*?"dimensions":\s*\[(.*?)\]', kernel.rest)[1]
        pairs = math.prod(map(int, maps.replace('"', "").split(",")))  # [B, H, N, N]
        size = _dimensions(inside[kernel.operands[0]].shape)[-1]
        return 2 * pairs * size * (5 if "Backward" in kernel.rest else 2)
    return sum(_product_flops(each, fused) for each in fused.values() if each.opcode == "dot")


def _product_flops(product, inside):
    """Of a dot, or of a call of cuBLAS: both name what they sum over."""
    contracted = re.search(r'lhs_contracting_dim\w*"?[=:][\[{]([\d,"]*)[\]}]', product.rest)[1]
    left = _dimensions(inside[product.operands[0]].shape)
    summed = math.prod(left[int(axis)] for axis in contracted.replace('"', "").split(",") if axis)
    return 2 * math.prod(_dimensions(product.shape)) * summed


def _moved(operation, inside):
    """Bytes of an operation that is a kernel by itself."""
    if operation.opcode.endswith("-start"):  # whose result repeats what it reads
        return _size(operation.shape)
    read = sum(_size(inside[name].shape) for name in {*operation.operands} if name in inside)
    return read + _size(operation.shape)


def _moved_by_fusion(fused):
    users = defaultdict(list)
    for each in fused.values():
        for place, name in enumerate(each.operands):
            users[name].append((each, place))

    def read(name):
        """Bytes that are read of a parameter, or of a view of it."""
        most, needed = _size(fused[name].shape), 0
        for user, place in users[name]:
            if user.opcode in ("slice", "dynamic-slice"):
                needed += _size(user.shape)
            elif user.opcode == "bitcast":
                needed += read(user.name)
            elif user.opcode != "dynamic-update-slice" or place:  # what it updates is not read
                return most
        return min(needed, most)

    def written(each):
        if each.opcode == "tuple":
            return sum(written(fused[name]) for name in each.operands)
        if each.opcode == "bitcast":
            return written(fused[each.operands[0]])
        if each.opcode == "dynamic-update-slice":
            return _size(fused[each.operands[1]].shape)
        return _size(each.shape)

    (root,) = (each for each in fused.values() if each.root)
    return written(root) + sum(read(each.name) for each in fused.values() if each.opcode == "parameter")
