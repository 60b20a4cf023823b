"""Which matmuls can stand FP4: measured on a model, real batches and a loss, and solved for a precision plan.

model, batches, loss ── probe ── measurements ── score ── solve ── plan.json
                                                      └── verify (plans run for real) ── report.html
"""
