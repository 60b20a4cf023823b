"""Graph passes: each takes an FX graph one step closer to NVFP4."""

if __name__ != "nvfp4c.passes":
    raise ImportError(
        "'passes' is a part of nvfp4c and not a package of its own: importing it bare would make a second copy. "
        "Use 'import nvfp4c.passes' instead."
    )
