"""Where the weights go: devices, layouts, and fused layers."""
