"""What both ends of the wire share: tensors, errors, identities, limits. Needs numpy and protobuf only."""
