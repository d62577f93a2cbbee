"""What bench/on_gpu.sh runs: a module a part, each with its own time, rows and summary."""
