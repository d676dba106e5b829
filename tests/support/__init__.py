"""What tests share: a fork server for worker processes, a launcher that kills and restarts them, injected faults."""
