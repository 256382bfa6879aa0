"""What this library costs, beside what others cost, measured in the same run on this machine."""
