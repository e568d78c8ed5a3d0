"""Triton's interpreter with the NumPy that is installed; processes that a test starts call it themselves."""


def mend_interpreter() -> None:
    """Triton 3.6's interpreter makes loop bounds of arrays of one element; NumPy 2.4 refuses to convert them."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended
