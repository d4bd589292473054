"""Reading and writing autoencoders in the formats of other tools."""
