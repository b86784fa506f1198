"""What is given to an index: wheels and the source archive, tried in empty environments, and what a release needs."""
