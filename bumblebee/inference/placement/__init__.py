"""Where the weights go: devices, and the CPU's prepacked layout."""
