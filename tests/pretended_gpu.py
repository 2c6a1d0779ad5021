"""A pretended GPU: tensors that say they lie on cuda:0, while the CPU computes with them.

    numbers = on_gpu(take_step, run, "cuda")  # in a process that has a GPU, or pretends one

What a card refuses is refused: an operation on tensors of both devices, number types that do not
fit and that autocast does not convert. So is float64, which MPS has not. Everything runs as it is:
the loader's processes, autocast, bfloat16 weights, the backward pass, the optimizer, checkpoints.

Not seen are a card's own kernels, its memory, its speed, and NCCL. Autograd's engine asks for a
driver, so `backward` takes its place: it calls torch's own formulas in the engine's order.
"""

import ctypes
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.cuda.amp.common
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CARD = torch.device("cuda", 0)
COPY = torch.ops.aten.copy_.default
MAY_MIX = (COPY, torch.ops.aten._to_copy.default, torch.ops.aten.index.Tensor)  # both devices


@functools.cache
def pretending_process():
    """Returns a forked process that pretends a GPU, for good, as a pool of one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("fork"), pretend)


def on_gpu(case, *arguments):
    """Returns case(*arguments), computed where there is a GPU, or a pretended one."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(False)  # a training on the CPU has switched them on
        return case(*arguments)
    return pretending_process().submit(case, *arguments).result()


# ---- tensors and operations ----------------------------------------------------------------------


class OnCard(torch.Tensor):
    """A tensor that says cuda:0; `numbers` is what the CPU computes with."""

    @staticmethod
    def __new__(cls, numbers):
        if numbers.dtype == torch.float64:
            raise RuntimeError("a float64 tensor on the card")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=CARD,
            storage_offset=numbers.storage_offset())
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __repr__(self):
        return f"on the card: {self.numbers}"

    def tolist(self):
        return self.numbers.tolist()

    def untyped_storage(self):  # safetensors asks which tensors share one
        return self.numbers.untyped_storage()


class Operations(TorchDispatchMode):
    """Sees every operation, factories and transfers too, which have no argument on the card."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def is_on_card(x):
    """Tells whether x is a tensor on the card: an OnCard, or a Parameter whose data is one."""
    return isinstance(x, torch.Tensor) and hasattr(x, "numbers")


def numbers_of(x):
    """Returns the CPU's tensor for one on the card; anything else as it is."""
    return x.numbers if is_on_card(x) else x


def compute(function, args, kwargs):
    """Runs an operation. The result is on the card if an argument is, unless a device is asked."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    cards = [x for x in tensors if is_on_card(x)]
    others = [tuple(x.shape) for x in tensors if not is_on_card(x) and x.dim()]
    if cards and others and function not in MAY_MIX:
        raise RuntimeError(f"{function}: tensors on cuda and on cpu, those of shapes {others}")

    # The CPU computes, and makes what is asked for on the card.
    cpu_args, cpu_kwargs = tree_unflatten([numbers_of(x) for x in leaves], structure)
    asked = cpu_kwargs.get("device")
    if asked is not None:
        cpu_kwargs["device"] = "cpu"
    cpu_kwargs.pop("pin_memory", None)
    result = function(*cpu_args, **cpu_kwargs)

    goes_to_card = is_on_card(args[0]) if function is COPY else bool(cards)
    if asked is not None:
        goes_to_card = torch.device(asked).type == "cuda"

    def wrap(x):
        if not goes_to_card or not isinstance(x, torch.Tensor):
            return x
        changed_in_place = [card for card in cards if card.numbers is x]
        return changed_in_place[0] if changed_in_place else OnCard(x)

    return tree_map(wrap, result)


# ---- what is not an operation --------------------------------------------------------------------


def nodes_of(loss):
    """Returns the nodes of a loss's graph as the engine calls them: the last first, leaves last."""
    nodes, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo:
        before = {node for node, _ in todo.pop().next_functions if node is not None}
        todo += before - nodes
        nodes |= before
    return sorted(nodes, key=lambda node: (hasattr(node, "variable"), -node._sequence_nr()))


@torch.no_grad()
def backward(loss):
    """Adds a loss's gradients to the leaves' grad."""
    nodes = nodes_of(loss)
    arrived = {node: [None] * len(node._input_metadata) for node in nodes}

    def arrive(node, place, gradient):
        meta, earlier = node._input_metadata[place], arrived[node][place]
        assert gradient.device == meta.device
        gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)  # as the engine does
        arrived[node][place] = gradient if earlier is None else earlier + gradient

    arrive(loss.grad_fn, 0, torch.ones_like(loss))
    for node in nodes:
        gradients = arrived[node]
        if hasattr(node, "variable"):
            leaf, (gradient,) = node.variable, gradients
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue

        # What no gradient came to has none: zeros.
        for place, meta in enumerate(node._input_metadata):
            if gradients[place] is None:
                gradients[place] = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        results = node(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        for (following, place), gradient in zip(node.next_functions, results):
            if following is not None and gradient is not None:
                arrive(following, place, gradient)


def set_data(tensor, other):
    """Sets tensor.data, and the numbers with it."""
    torch._C.TensorBase.data.__set__(tensor, other)
    if is_on_card(other):
        tensor.numbers = other.numbers


def guard_nothing():
    """Gives CUDA a device guard that does nothing: autograd asks it for a stream.

    torch has one, for FakeTensorMode, which takes the place of a guard that counts no cards.
    PyTorch's CPU build has no such guard. Here is one in C++'s layout: a pointer to its methods.
    """
    count = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda guard: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(count, ctypes.c_void_p).value] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(methods))

    # The guards stand in the order of c10::DeviceType: the CPU's, then CUDA's.
    guards = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(torch._C.__file__),
                                          "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()


def pretend():
    """Pretends a GPU in this process, for good."""
    # Nothing asks for a driver, and the loader pins.
    guard_nothing()
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # else autocast is off
    torch.cuda.set_device = torch.accelerator.set_device_index = lambda device: None
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.is_available = lambda: True
    torch.Tensor.pin_memory = lambda tensor: tensor.clone()

    # Python's ways to tensors, beside operations
    make, engine = torch.tensor, torch.Tensor.backward
    torch._C._set_only_lift_cpu_tensors(True)  # made on the CPU, then moved
    torch.tensor = lambda data, **options: make(tree_map(numbers_of, data), **options)
    torch.Tensor.data = property(torch.Tensor.detach, set_data)
    torch.Tensor.backward = lambda x: backward(x) if is_on_card(x) else engine(x)
    torch._C._current_graph_task_id = lambda: 0  # torch.utils.checkpoint recomputes once for each
    Operations().__enter__()
