"""Files of conversations: rows in, answers in a folder, a server for each worker."""
