"""Other tools' files: what an index says, for Neuronpedia, SAEDashboard and delphi, and labels from them."""
