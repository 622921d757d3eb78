"""Triton's interpreter without what it does again and again: a third of its time goes on looking which functions of the
language to replace, at every call of a function within a kernel, and on a table of types, at every value.

What is computed stays the same, but for maxima and minima of two values: they drop a NaN, unless a kernel asks otherwise, as on a GPU (the
interpreter's reductions do already). Releases of Triton that look otherwise inside run as they are.
"""

import inspect

import numpy


def install():
    """Let this process interpret faster."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr", "_get_np_dtype")):
        return
    patch_builtin, np_dtype = interpreter._patch_builtin, interpreter._get_np_dtype
    packages = (tl, tl.core, tl.math, tl.tensor, getattr(tl.core, "tensor_descriptor_base", None))
    builtins = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in packages
        if package is not None
    }

    def patch(package, builder, scope):
        if package not in builtins:
            return patch_builtin(package, builder, scope)
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # and not replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "create_maxnumf") and hasattr(builder, "create_minnumf"):
        builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, numpy.fmax)
        builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, numpy.fmin)

    found = {}

    def dtype(kind):
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        name = "pointer" if isinstance(kind, tl.pointer_type) else kind.name
        if name not in found:
            found[name] = np_dtype(kind)
        return found[name]

    interpreter._patch_builtin, interpreter._get_np_dtype = patch, dtype
