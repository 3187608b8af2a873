"""What a forward costs: analytic FLOPs and cache bytes, and measured times."""
