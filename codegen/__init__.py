"""Lowering: what the `nvfp4::` operations become on each target."""

if __name__ != "nvfp4c.codegen":
    raise ImportError(
        "'codegen' is a part of nvfp4c and not a package of its own: importing it bare would make a second copy. "
        "Use 'import nvfp4c.codegen' instead."
    )
