"""What `zokernels bench` measures: whole steps, beside plain forwards and the peers."""
