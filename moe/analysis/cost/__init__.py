"""What a model costs, by its config alone: FLOPs, bytes, memory, time, money (docs/compute.md)."""
