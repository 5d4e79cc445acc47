"""The text a model is measured on: files to documents, documents to sequences, sequences to a probe of three parts."""
