//! What the tests of whole guests share.
