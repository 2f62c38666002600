#!/bin/sh
# HAProxy, nicer than engine and front: what wakes it waits for a pause of theirs, and it passes on more at once.
exec nice -n 10 "$CPT_HAPROXY" "$@"
