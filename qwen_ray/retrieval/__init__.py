"""Knowledge bases: documents as passages, versioned on LanceDB, searched by meaning and by words."""
