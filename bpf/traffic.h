/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Traffic as evidence. A busy pod lets probes time out while it goes on serving. Where its probes allow it, what the
 * pod sends to any client shows that it is alive: for HTTP, a response that is not a server error; for TCP, also that
 * it closes connections. A timeout is the absence of evidence, and traffic makes up for it; an error is evidence, and
 * withdraws the success as usual. Some probes reach the pod whatever its traffic shows, so that errors are found.
 */
#ifndef PROBELET_TRAFFIC_H
#define PROBELET_TRAFFIC_H

#include "evidence.h"
#include "listener.h"
#include "maps.h"
#include "parse.h"

/* The maximum number of consecutive probes that are answered before one is passed on. */
#define TRAFFIC_ANSWERS_MAX 9

/*
 * The resolution of served_at and closed_at. Until it has passed, further packets of a busy pod do not cost a look at
 * its socket.
 */
#define TRAFFIC_NOTED_NS (SECOND_NS / 50)

static __always_inline bool is_noted(__u64 noted_at, __u64 now)
{
	return (__s64)(now - noted_at) < (__s64)TRAFFIC_NOTED_NS;
}

/* Notes what a pod's packet shows. Only call it for packets of the pod itself, not for answers in its name. */
static __always_inline void note_traffic(struct __sk_buff *skb, const struct segment *seg)
{
	bool closed = seg->tcp_flags & TCP_FIN, served;
	struct endpoint_key key;
	struct device *device;
	struct scratch *s;
	struct tally *port;
	__u64 now;
	__u16 status;

	if (!seg->may_show_traffic || (!seg->payload && !closed) || seg->tcp_flags & TCP_RST)
		return;
	status = parse_status(skb, seg);
	served = status >= 200 && status < 500;
	if (!served && !closed)
		return;
	device = bpf_map_lookup_elem(&devices, &seg->flow.ifindex);
	if (!device)
		return;
	key = endpoint(seg->flow.ifindex, device->generation, seg->flow.pod_port, KIND_PORT, 0);
	port = bpf_map_lookup_elem(&endpoint_tallies, &key);
	if (!port)
		return;
	now = bpf_ktime_get_boot_ns();
	if ((!served || is_noted(port->served_at, now)) && (!closed || is_noted(port->closed_at, now)))
		return;
	/* The kernel goes on repeating what a client does not acknowledge, for many minutes, even if the pod hangs. */
	s = get_scratch();
	if (!s)
		return;
	set_tuple(seg, s);
	if (is_repeating(skb, s, device->nsid))
		return;
	if (served)
		port->served_at = now;
	if (closed)
		port->closed_at = now;
}

/* Reports whether the traffic of a port shows, at the given time, that the pod would serve the evidence's endpoint. */
static __always_inline bool is_serving(const struct evidence *e, const struct tally *port, enum endpoint_kind kind,
				       __u64 at)
{
	__u64 last = port->served_at;

	if (kind == KIND_TCP)
		last = later(last, port->closed_at);
	/* Another CPU may have seen the pod serve a little later than this one took the time. */
	return at < e->traffic_until && last && (__s64)(at - last) < (__s64)((__u64)e->traffic_window_ms * 1000000);
}

/* Reports whether an endpoint that traffic may vouch for has had so many answers that a real probe is due. */
static __always_inline bool is_real_due(const struct evidence *e, const struct tally *endpoint)
{
	return e->traffic_until && endpoint && endpoint->answered >= TRAFFIC_ANSWERS_MAX;
}

/* Notes that a probe of an endpoint is passed on. */
static __always_inline void note_passed(const struct endpoint_key *key)
{
	struct tally *endpoint = bpf_map_lookup_elem(&endpoint_tallies, key);

	if (endpoint && endpoint->answered)
		__sync_lock_test_and_set(&endpoint->answered, 0);
}

#endif
