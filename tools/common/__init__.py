"""What several commands share: data, networks, training, timing, results files and tables."""
