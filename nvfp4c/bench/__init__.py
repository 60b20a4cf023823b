"""Measurements that anyone can repeat: kernels against the device's own ceilings, training steps against Inductor."""
