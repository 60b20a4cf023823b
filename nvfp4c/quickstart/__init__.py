"""The quickstart: one small GPT trained twice on real text, in high precision and in NVFP4, and the two compared."""
