"""What a run records: metrics, events, the run manifest, trackers, profiles."""
