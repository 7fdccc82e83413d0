"""What a run gave, for people: one offline page a run folder, and pictures for the documentation."""
