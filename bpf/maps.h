/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* The maps, each with its key, value, writers, readers and lifetime. Their types are in abi.h. */
#ifndef PROBELET_MAPS_H
#define PROBELET_MAPS_H

#include "abi.h"

/*
 * Constants set by the loader: a random token and random keys, which pods cannot read, and the reply for each status
 * from STATUS_MIN on.
 */
const volatile __u64 order_token = 0;
const volatile struct question_key question_keys[REQUEST_MAX / 8] = {};
const volatile struct reply_text replies[STATUS_MAX - STATUS_MIN + 1] = {};

/* key: 0; value: who is a prober. Written by the daemon, read by steer at a SYN. Lives until the pins are removed. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct prober_config);
} prober SEC(".maps");

/*
 * key: a socket of the prober's process; value: the PID of that process. Written by mark when the socket is created,
 * read by steer at a SYN. The kernel removes it along with the socket.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} prober_sockets SEC(".maps");

/*
 * key: cookie of a socket of the daemon; value: unused. Its connection is passed on even if the daemon counts as a
 * prober. Added by the daemon before it connects and removed afterwards; read by steer at a SYN. An LRU, so that
 * entries left by a killed daemon cannot fill it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} own_sockets SEC(".maps");

/*
 * key: ifindex of a host-side veth; value: how it is attached, whether its answers arrive, what the pod accepts.
 * Created when a device is attached (by ADD or the daemon); the first thing to be removed when it is detached. In
 * between, steer and observe write trust and pod_mtu, steer writes netns_cookie if it is 0, and watch writes
 * withdrawn_at. `probeletctl trust` and promotion replace it to restart the trial, but keep withdrawn_at and what is
 * known about the namespace. Read by all programs except respond.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

/*
 * key: an endpoint or a port; value: what was last observed of it. Written by the daemon, read by steer and observe.
 * Removed by the daemon along with the endpoint, or when the device is detached. Not preallocated, because few pods
 * have ENDPOINTS_PER_POD.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PODS_MAX *ENDPOINTS_PER_POD);
	__type(key, struct endpoint_key);
	__type(value, struct evidence);
} endpoint_evidence SEC(".maps");

/*
 * key: an endpoint or a port; value: what the programs note about it. Created (zeroed) by the daemon before the
 * evidence and removed after it, or when the device is detached. In between only steer and observe write it, so that
 * kernel and user space never overwrite each other. Read by them, the daemon and probeletctl.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PODS_MAX *ENDPOINTS_PER_POD);
	__type(key, struct endpoint_key);
	__type(value, struct tally);
} endpoint_tallies SEC(".maps");

/*
 * key: a device; value: its keys in endpoint_evidence and endpoint_tallies. Written by the daemon before it adds an
 * endpoint and after it removes one; read and removed when the device is detached. Not used by the programs.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PODS_MAX);
	__type(key, struct device_key);
	__type(value, struct endpoint_list);
} endpoint_lists SEC(".maps");

/*
 * key: inode number of a pod's network namespace; value: its devices. Written when a device is attached or detached,
 * read by watch. Lives as long as any of its devices is attached.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u32);
	__type(value, struct netns_devices);
} pod_netns SEC(".maps");

/*
 * key: addresses, ports and device of a connection of a prober, or of the daemon's; value: its state. Created by steer
 * at a SYN, read and changed by steer and observe, removed by them when the connection ends, or by sweep after its
 * deadline or once its device is detached. Not an LRU: new connections must not evict one that was handed over. When it
 * is full, connections are passed on unobserved.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FLOWS_MAX);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/*
 * key: that of a flow; value: what its client has sent while it is being handed over. Written by steer, read by
 * observe. Removed by observe once the pod has acknowledged it, or along with the flow. When it is full, nothing is
 * stored, and the client's retransmission brings the request.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, struct flow_key);
	__type(value, struct stored);
} requests SEC(".maps");

/* key: 0; value: all zero. Never written. steer creates entries of requests from it, too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct stored);
} blank SEC(".maps");

/*
 * Index: client port modulo FLOW_PORT_SLOTS; value: the number of flows with such a port. 0 saves a packet the lookup
 * in flows. Written by steer, observe and sweep as they add and remove flows; read by steer and observe. Lives as long
 * as the programs.
 */
#define FLOW_PORT_SLOTS 4096
__u32 flow_ports[FLOW_PORT_SLOTS];

/*
 * Index: a hash of a device and a port (may_show_traffic); value: 1 if traffic from there may be evidence. 0 saves all
 * other packets of pods the lookup of the port. Set by the daemon along with a port's evidence, and cleared soon after
 * that is gone, or when a daemon starts; read by observe. Lives until the pins are removed.
 */
#define TRAFFIC_SLOTS 4096
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TRAFFIC_SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} traffic_slots SEC(".maps");

/*
 * Records of connections that were passed on or handed over, each a struct record followed by its payload. Written by
 * steer and observe, consumed by the daemon. When it is full, records are lost, and counted.
 */
#define RECORDS_BYTES (2 << 20)
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RECORDS_BYTES);
} records SEC(".maps");

/*
 * key: enum counter; value: count per CPU. Written by all programs except respond, read by the daemon and probeletctl.
 * Lives until the pins are removed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNT_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/*
 * key: index of a bucket, or enum age; value: count (AGE_SUM: ns) per CPU. Written by steer, read by the daemon. Lives
 * until the pins are removed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, AGE_MAX);
	__type(key, __u32);
	__type(value, __u64);
} answer_ages SEC(".maps");

#endif
