"""The protocol simulator: the decisions of recovery under a fake clock, network and storage."""
