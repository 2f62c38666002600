"""Engines that answer requests, and the pool that brings shards through them."""
