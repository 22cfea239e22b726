"""What is put out for webhooks: which endpoints there are, and what is said of a task."""
