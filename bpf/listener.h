/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The listening socket that a SYN would meet in its pod: finding it, and judging whether an answer on its behalf would
 * be true. A TCP probe asks whether the kernel would accept a connection, so the kernel's own socket is the evidence.
 * If a process stops accepting, the probes that reach it fill its queue until the kernel refuses them. Answers would
 * keep the queue from filling. So none is given while connections wait in it, and only a few in a row (answers_max)
 * before a probe must reach the pod and wait there.
 */
#ifndef PROBELET_LISTENER_H
#define PROBELET_LISTENER_H

#include <bpf/bpf_core_read.h>

#include "count.h"
#include "evidence.h"
#include "kernel.h"
#include "maps.h"
#include "parse.h"
#include "scratch.h"

/* Set by the loader: 1 if the kernel describes its types (BTF) and lets this program read them (CAP_PERFMON). */
const volatile __u8 sees_listeners = 0;

/* A connection that waits longer than this to be accepted indicates a process that is stuck, not merely busy. */
#define LISTENER_WAIT_US 50000
#define ANSWERS_MAX 9

static __always_inline __u64 now_us(void)
{
	return bpf_ktime_get_ns() / 1000; /* tcp_clock_us in include/net/tcp.h */
}

/* Reports whether a listening socket refuses packets that an ordinary one would accept. */
static __always_inline bool is_special(const struct tcp_sock *tcp)
{
	const struct inet_sock *inet = &tcp->inet_conn.icsk_inet;

	if (inet->sk.__sk_common.skc_bound_dev_if || inet->sk.sk_filter || inet->min_ttl)
		return true;
	if (bpf_core_field_exists(inet->pinet6) && inet->pinet6 && inet->pinet6->min_hopcount)
		return true;
	if (bpf_core_field_exists(tcp->md5sig_info) && tcp->md5sig_info)
		return true;
	return bpf_core_field_exists(tcp->ao_info) && tcp->ao_info;
}

/*
 * Copies the state of a socket to l. Returns 0, or -1 if it is not a listening socket. The queues are read without
 * their locks, so a connection that comes or goes meanwhile may or may not be counted.
 */
static __always_inline int examine(const struct tcp_sock *tcp, struct listener *l)
{
	const struct sock *sk = &tcp->inet_conn.icsk_inet.sk;
	const struct request_sock *head;
	const struct net *net;

	if (sk->__sk_common.skc_state != STATE_LISTEN)
		return -1;
	l->id = (__u64)(long)sk;
	net = sk->__sk_common.skc_net.net;
	l->netns_cookie = net->net_cookie;
	l->netns = net->ns.inum;
	l->limit = sk->sk_max_ack_backlog;
	l->waiting = sk->sk_ack_backlog;
	l->requests = tcp->inet_conn.icsk_accept_queue.qlen.counter;
	l->special = is_special(tcp);
	l->shared = BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_reuseport);
	head = tcp->inet_conn.icsk_accept_queue.rskq_accept_head;
	l->waits = head != NULL;
	l->head_at = 0;
	if (head)
		bpf_probe_read_kernel(&l->head_at, sizeof(l->head_at),
				      &((const struct tcp_request_sock *)head)->snt_synack);
	return 0;
}

/* Returns the pod's socket that would receive a packet with s->tuple, or NULL. The caller must release it. */
static __always_inline struct bpf_sock *look_up_tuple(struct __sk_buff *skb, struct scratch *s, int nsid)
{
	if (s->is_ipv4)
		return bpf_skc_lookup_tcp(skb, &s->tuple, sizeof(s->tuple.ipv4), nsid, 0);
	return bpf_skc_lookup_tcp(skb, &s->tuple, sizeof(s->tuple.ipv6), nsid, 0);
}

enum found {
	FOUND_NONE,
	FOUND_LISTENER, /* s->listener is filled in */
	FOUND_OTHER,
};

/* Looks up the socket that would receive the SYN in s->tuple. */
static __always_inline enum found look_up(struct __sk_buff *skb, struct scratch *s, int nsid)
{
	enum found result = FOUND_OTHER;
	const struct tcp_sock *tcp;
	struct bpf_sock *found;

	found = look_up_tuple(skb, s, nsid);
	if (!found)
		return FOUND_NONE;
	tcp = bpf_skc_to_tcp_sock(found);
	if (tcp && !examine(tcp, &s->listener))
		result = FOUND_LISTENER;
	bpf_sk_release(found);
	return result;
}

/*
 * Finds the listening socket that the SYN in s->tuple would meet. Returns 0, or -1 if there is none. It is a global
 * function so that the verifier checks it only once.
 */
__noinline int find_listener(struct __sk_buff *skb, struct scratch *s, int nsid)
{
	enum found found;

	if (!s || !sees_listeners || nsid < 0)
		return -1;
	found = look_up(skb, s, nsid);
	if (found == FOUND_OTHER) {
		/* The pod still has an earlier connection on these ports, which may hide a listener. */
		if (s->is_ipv4)
			s->tuple.ipv4.sport = 0;
		else
			s->tuple.ipv6.sport = 0;
		found = look_up(skb, s, nsid);
	}
	return found == FOUND_LISTENER ? 0 : -1;
}

/*
 * Returns the id of the listening socket that has answered the SYN in s->tuple, or 0. It can be found only while the
 * connection is being established. It is a global function like the one above.
 */
__noinline __u64 find_answering(struct __sk_buff *skb, struct scratch *s, int nsid)
{
	const struct request_sock *request;
	struct bpf_sock *found;
	__u64 id = 0;

	if (!s || !sees_listeners || nsid < 0)
		return 0;
	found = look_up_tuple(skb, s, nsid);
	if (!found)
		return 0;
	if (found->state == STATE_NEW_SYN_RECV) {
		/*
		 * bpf_skc_to_tcp_request_sock rejects request sockets of MPTCP listeners. Read like this, the address
		 * is a number to the verifier, so that the offset of a field can be added.
		 */
		bpf_probe_read_kernel(&request, sizeof(request), &found);
		id = (__u64)(long)BPF_CORE_READ(request, __req_common.skc_listener);
	}
	bpf_sk_release(found);
	return id;
}

/*
 * Reports whether the pod's kernel is repeating what it has sent on the connection in s->tuple, because its client does
 * not acknowledge it. What it repeats to a closed window does not count as a retransmission there. False if the
 * connection is not found. It is a global function like the ones above.
 */
__noinline int is_repeating(struct __sk_buff *skb, struct scratch *s, int nsid)
{
	const struct tcp_sock *tcp;
	struct bpf_sock *found;
	int repeating = 0;

	if (!s || !sees_listeners || nsid < 0)
		return 0;
	found = look_up_tuple(skb, s, nsid);
	if (!found)
		return 0;
	tcp = bpf_skc_to_tcp_sock(found);
	if (tcp && bpf_core_field_exists(tcp->inet_conn.icsk_retransmits))
		repeating = tcp->inet_conn.icsk_retransmits || !tcp->snd_wnd ||
			    BPF_CORE_READ_BITFIELD(&tcp->inet_conn, icsk_ca_state) == CA_LOSS;
	bpf_sk_release(found);
	return repeating;
}

static __always_inline void set_tuple(const struct segment *seg, struct scratch *s)
{
	__be16 client_port = bpf_htons(seg->flow.client_port), pod_port = bpf_htons(seg->flow.pod_port);

	s->is_ipv4 = seg->l3_len == sizeof(struct iphdr);
	if (s->is_ipv4) {
		__builtin_memcpy(&s->tuple.ipv4.saddr, seg->flow.client_addr + 12, 4);
		__builtin_memcpy(&s->tuple.ipv4.daddr, seg->flow.pod_addr + 12, 4);
		s->tuple.ipv4.sport = client_port;
		s->tuple.ipv4.dport = pod_port;
	} else {
		__builtin_memcpy(s->tuple.ipv6.saddr, seg->flow.client_addr, 16);
		__builtin_memcpy(s->tuple.ipv6.daddr, seg->flow.pod_addr, 16);
		s->tuple.ipv6.sport = client_port;
		s->tuple.ipv6.dport = pod_port;
	}
}

/*
 * Reports whether a socket belongs to the pod: the id of the pod's namespace may have been reused for another pod's.
 * The inode number is reused as well, but not while a device exists in the namespace, such as the peer of this one.
 */
static __always_inline bool is_in_pod(const struct listener *l, struct device *device)
{
	if (!device->netns_cookie && l->netns == device->netns)
		device->netns_cookie = l->netns_cookie;
	return device->netns_cookie == l->netns_cookie;
}

/*
 * Returns how many probes in a row may be answered on behalf of a socket. Without answers, a process that accepts
 * nothing is detected after limit + 2 probes; this is by how many more probes the detection may be delayed. In a group
 * of sockets that share the port, only the one that this SYN would meet was examined.
 */
static __always_inline __u32 answers_max(const struct listener *l)
{
	if (!l->limit || l->special)
		return 0;
	if (l->shared || l->limit < 2 * 8)
		return 1;
	return l->limit < ANSWERS_MAX * 8 ? l->limit / 8 : ANSWERS_MAX;
}

/*
 * Returns what keeps a probe from being answered, or 0. A TCP probe that may be answered is counted.
 *
 * The count restarts once a connection of a prober, or of the daemon's, is known to have been accepted. Its SYN-ACK
 * alone proves nothing about the process, since the kernel sends it. But if both queues of the socket that sent it are
 * empty, the connection has left them. The same holds if the SYN-ACK was sent LISTENER_WAIT_US ago and nothing in the
 * queue is that old, because connections are accepted in order of arrival. connected_at is that of the port, read
 * before the queues.
 */
static __always_inline enum obstacle judge(const struct listener *l, struct tally *port, __u64 connected_at,
					   bool is_tcp)
{
	__u64 now = now_us();

	if (l->waits && (__s64)(now - l->head_at) >= LISTENER_WAIT_US)
		return OBSTACLE_HEAD_OLD;
	if (!is_tcp)
		return 0;
	if (l->special)
		return OBSTACLE_SPECIAL;
	if (2 * (__u64)l->waiting > l->limit || 2 * (__u64)l->requests > l->limit)
		return OBSTACLE_QUEUE_LONG;
	if (connected_at && port->connected_to == l->id &&
	    ((!l->waits && !l->requests) || (__s64)(now - connected_at) >= LISTENER_WAIT_US)) {
		port->connected_at = 0;
		__sync_lock_test_and_set(&port->answered, 0);
	}
	if (port->answered >= port->answered_max ||
	    __sync_fetch_and_add(&port->answered, 1) >= port->answered_max) /* another CPU was first */
		return OBSTACLE_REAL_DUE;
	return 0;
}

/* Examines the listening socket that a SYN would meet. Returns false if there is none, or it is not the pod's. */
static __always_inline bool look(struct __sk_buff *skb, const struct segment *seg, struct device *device,
				 struct tally *port, struct scratch *s)
{
	bool found;

	set_tuple(seg, s);
	found = !find_listener(skb, s, device->nsid) && is_in_pod(&s->listener, device);
	port->answered_max = found ? answers_max(&s->listener) : 0;
	return found;
}

static __always_inline void note_obstacle(struct tally *port, enum obstacle obstacle)
{
	port->obstacle = obstacle;
	count(COUNT_PASSED_NO_LISTENER - OBSTACLE_NO_LISTENER + obstacle);
}

/*
 * Reports whether the pod's listening socket permits answers on a port, provided that the port is fresh. On a port with
 * a TCP probe it decides alone; on others it has a veto. Where sockets cannot be examined, the result is true. The
 * socket is examined even if the port is not fresh, to update answered_max. With serving, the pod's traffic says more
 * than the queue does, so it is enough that there is a listening socket; the flow is marked, because that holds only
 * for endpoints that traffic vouches for.
 */
static __always_inline bool is_listening(struct __sk_buff *skb, const struct segment *seg, struct device *device,
					 struct tally *port, struct flow *flow, bool fresh, bool serving)
{
	struct endpoint_key key = endpoint(seg->flow.ifindex, device->generation, seg->flow.pod_port, KIND_TCP, 0);
	enum obstacle obstacle = OBSTACLE_NO_LISTENER;
	struct scratch *s = get_scratch();
	__u64 connected_at;
	bool found;

	if (!sees_listeners || device->nsid < 0)
		return true;
	if (!s)
		return false;
	connected_at = *(volatile __u64 *)&port->connected_at;
	found = look(skb, seg, device, port, s);
	if (!fresh && !serving)
		return false;
	if (found && fresh)
		obstacle = judge(&s->listener, port, connected_at, bpf_map_lookup_elem(&endpoint_evidence, &key));
	if (found && obstacle && serving) {
		flow->flags |= FLOW_BY_TRAFFIC;
		obstacle = 0;
	}
	if (!obstacle)
		return true;
	note_obstacle(port, obstacle);
	return false;
}

/*
 * Notes that the pod has answered a SYN, even if by a refusal, and with it earlier ones: it answers again. Returns the
 * tally of the port, or NULL.
 */
static __always_inline struct tally *note_answered(const struct segment *seg, const struct flow *flow)
{
	struct endpoint_key key = endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_PORT, 0);
	struct tally *port = bpf_map_lookup_elem(&endpoint_tallies, &key);
	__u64 asked_at = port ? *(volatile __u64 *)&port->asked_at : 0;

	if (asked_at && asked_at <= flow->started_at) /* unless steer has just passed on another SYN */
		__sync_val_compare_and_swap(&port->asked_at, asked_at, 0);
	return port;
}

/*
 * Notes that the pod's kernel has answered a SYN of a prober, or of the daemon, so that judge can tell whether the
 * connection is accepted. A netfilter rule, a program or a bound socket may have led it to a different socket than the
 * one that steer finds.
 */
static __always_inline void note_connected(struct __sk_buff *skb, const struct segment *seg, const struct flow *flow)
{
	struct tally *port = note_answered(seg, flow);
	struct scratch *s = get_scratch();
	struct device *device;
	__u64 id;

	device = bpf_map_lookup_elem(&devices, &seg->flow.ifindex);
	if (!port || !sees_listeners || !s || !device || device->nsid < 0)
		return;
	set_tuple(seg, s);
	id = find_answering(skb, s, device->nsid);
	if (!id || (port->connected_at && port->connected_to == id))
		return;
	port->connected_at = 0;
	__sync_lock_test_and_set(&port->connected_to,
				 id); /* a barrier: judge must not pair the time with another socket */
	port->connected_at = now_us();
}

/* Voids all evidence about the pod in whose network namespace a listening socket closed. */
static __always_inline void note_closed(const struct sock *sk)
{
	__u32 netns = sk->__sk_common.skc_net.net->ns.inum, ifindex;
	struct netns_devices *devices_of = bpf_map_lookup_elem(&pod_netns, &netns);
	struct device *device;

	if (!devices_of)
		return;
	for (__u32 i = 0; i < DEVICES_PER_NETNS; i++) {
		ifindex = devices_of->ifindex[i];
		device = bpf_map_lookup_elem(&devices, &ifindex);
		if (ifindex && device && advance(&device->withdrawn_at, bpf_ktime_get_boot_ns()))
			count(COUNT_WITHDRAWN_LISTENER_CLOSED);
	}
}

#endif
