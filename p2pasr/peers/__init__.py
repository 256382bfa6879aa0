"""Finding each other and exchanging bytes: identity, the network process, directory, blobs."""
