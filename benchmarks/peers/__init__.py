"""The same work done with other libraries, through their public interfaces, in an environment of their own."""
