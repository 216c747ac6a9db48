// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * Programs on the host-side veth of a pod, in the host's network namespace (ARCHITECTURE.md has a diagram):
 *
 *   steer, tc egress: sees what the host sends to the pod. Decides at the SYN whether to take a prober's connection,
 *   and turns each packet of a taken one into its answer, in place, redirected into the receive path of the same
 *   device.
 *
 *   observe, tc ingress: sees what the pod sends. Splices connections that are handed over. Both programs record
 *   connections that reach the pod.
 *
 *   respond, XDP, only with HOOK_XDP: makes the answers instead of steer, which orders them.
 *
 * Programs for the whole machine:
 *
 *   watch, at the tracepoint inet_sock_set_state: sees pods' listening sockets close, and voids the pods' evidence.
 *
 *   mark, where the prober shares its cgroup: marks the sockets that the prober's process creates there.
 *
 *   sweep, run by the daemon: removes flows past their deadline, and those of detached devices.
 */
#include "abi.h"
#include "count.h"
#include "emit.h"
#include "evidence.h"
#include "flow.h"
#include "flow_record.h"
#include "kernel.h"
#include "listener.h"
#include "maps.h"
#include "mark.h"
#include "order.h"
#include "parse.h"
#include "scratch.h"
#include "traffic.h"

#define PASS TC_ACT_UNSPEC /* TCX_NEXT: leaves the verdict to the programs after us */
#define DROP TC_ACT_SHOT

/*
 * The window we grant. A client sends no more than this before its connection is handed over, so all of it can be
 * stored. Linux fills at most half of the window with one segment, which still holds a request of REQUEST_MAX.
 */
#define FIRST_WINDOW STORED_MAX

static __always_inline bool is_prober(const struct prober_config *config, struct __sk_buff *skb)
{
	__u64 cgroup_id = bpf_skb_cgroup_id(skb);

	if (!cgroup_id)
		return false;
	for (__u32 i = 0; i < PROBER_CGROUPS_MAX; i++)
		if (config->cgroup_ids[i] == cgroup_id)
			return !config->pid || is_marked(skb, config->pid);
	return config->any_local;
}

/*
 * Drops a packet at egress by a redirect to device 0, which does not exist. TC_ACT_SHOT would signal congestion to the
 * client's TCP.
 */
static __always_inline int drop_quietly(void)
{
	count(COUNT_DROPPED);
	return bpf_redirect(0, 0);
}

/* Overwrites the packet's options and payload with an order for respond. Returns false if it must be dropped. */
static __always_inline bool write_order(struct __sk_buff *skb, const struct segment *seg, const struct outgoing *out,
					__u16 status)
{
	struct order order = {
	    .token = order_token,
	    .seq = out->seq,
	    .ack = out->ack,
	    .mss = out->mss,
	    .window = out->window,
	    .status = status,
	    .tcp_flags = out->tcp_flags,
	};
	__u32 tcp_end = ETH_HLEN + seg->l3_len + sizeof(struct tcphdr);
	__be16 proto = bpf_htons(ETH_P_STEERED);

	/* Unlike in XDP, growing always works here. It also undoes segmentation offload, clones and fragments. */
	return !bpf_skb_change_tail(skb, tcp_end + STEERED_ROOM, 0) &&
	       !bpf_skb_store_bytes(skb, tcp_end, &order, sizeof(order), 0) &&
	       !bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto), 0);
}

/* Answers the client in the pod's name. flags are those of the flow; status selects the reply to append, 0: none. */
static __always_inline int answer(struct __sk_buff *skb, const struct segment *seg, __u32 flags, struct outgoing *out,
				  __u16 status)
{
	__u32 index = status - STATUS_MIN;
	const void *reply = NULL;
	bool done;

	asm volatile("" : "+r"(index)); /* for the verifier: makes the compared register also the one that is used */
	out->back = true;
	if (flags & FLOW_XDP) {
		done = write_order(skb, seg, out, status);
	} else {
		if (index <= STATUS_MAX - STATUS_MIN) {
			out->payload = replies[index].len;
			out->payload_sum = replies[index].sum;
			reply = (const void *)replies[index].bytes;
		}
		done = emit(skb, seg->l3_len, out, reply, REPLY_MAX);
	}
	if (!done)
		return DROP;
	skb->mark = 0; /* set for the client's packet, meaningless on the way back */
	skb->tc_index = (flags & (FLOW_TRIAL | FLOW_CONNECTED)) == FLOW_TRIAL ? HANDLED_TRIAL : HANDLED;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

static __always_inline int answer_syn(struct __sk_buff *skb, const struct segment *seg, const struct flow *flow)
{
	struct outgoing out = {
	    .seq = flow->our_isn,
	    .ack = flow->client_isn + 1,
	    .tcp_flags = TCP_SYN | TCP_ACK,
	    .mss = flow->client_mss, /* fits both the path to the pod and the pod (limit_mss) */
	    .window = FIRST_WINDOW,
	};

	return answer(skb, seg, flow->flags, &out, 0);
}

/* Hands a connection over: replays the client's SYN to the pod. */
static __always_inline int replay_syn(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	struct outgoing out = {
	    .seq = flow->client_isn,
	    .tcp_flags = TCP_SYN,
	    .mss = flow->client_mss,
	    .window = seg->window,
	};

	if (flow->state == FLOW_TAKEN) {
		flow->state = FLOW_HANDING;
		count(COUNT_HANDED_OVER);
	}
	flow->client_window = seg->window;
	set_deadline(flow, HANDING_NS);
	if (flow->state == FLOW_HANDED) /* observe has just changed it */
		set_deadline(flow, HANDED_NS);
	if (!emit(skb, seg->l3_len, &out, NULL, 0))
		return DROP;
	skb->tc_index = HANDLED;
	return PASS;
}

/* Changes a device's trust, unless the device was attached again or lost trust meanwhile. */
static __always_inline void change_trust(struct device *device, __u32 generation, enum trust trust, enum loss loss)
{
	union {
		struct {
			__u32 generation;
			__u16 loss, trust;
		};
		__u64 word;
	} from = {.generation = generation}, to = {.generation = generation, .loss = loss, .trust = trust};
	__u64 *word = (__u64 *)&device->generation;

	if (trust == TRUST_LOST)
		from.trust = device->trust;
	if (from.trust != TRUST_LOST && __sync_val_compare_and_swap(word, from.word, to.word) == from.word &&
	    trust == TRUST_LOST) {
		device->lost_at = bpf_ktime_get_boot_ns();
		count(COUNT_DEVICES_LOST);
	}
}

/* Notes that an answer was lost, dropped by something on the way. The device takes no connections from now on. */
static __always_inline void lose_trust(__u32 ifindex, __u32 generation, enum loss loss)
{
	struct device *device = bpf_map_lookup_elem(&devices, &ifindex);

	if (device)
		change_trust(device, generation, TRUST_LOST, loss);
}

/* Reports whether an answer sent at since is overdue. Either time may be slightly ahead if taken on another CPU. */
static __always_inline bool is_overdue(__u64 since, __u64 now)
{
	return (__s64)(now - since) > (__s64)ANSWER_LOST_NS;
}

/* Reports whether the flow watched on a port is still waiting for its client to acknowledge our SYN-ACK. */
static __always_inline bool is_unacknowledged(const struct segment *seg, const struct tally *port)
{
	struct scratch *s = get_scratch();
	struct flow *watched;

	if (!s)
		return false;
	s->other = seg->flow;
	s->other.client_port = port->watched_port;
	watched = bpf_map_lookup_elem(&flows, &s->other);
	return watched && watched->started_at == port->watched_at && watched->state == FLOW_TAKEN &&
	       !(watched->flags & FLOW_CONNECTED);
}

/*
 * Reports whether answers from this port are known to arrive, or this connection becomes the device's trial. A device
 * has only one trial, so where answers do not arrive, only one probe is delayed.
 */
static __always_inline bool is_trusted(const struct segment *seg, struct device *device, struct tally *port,
				       struct flow *flow)
{
	__u64 now = flow->started_at;

	if (device->trust == TRUST_UNPROVEN) {
		if (!device->trial_at && !__sync_val_compare_and_swap(&device->trial_at, 0, now)) {
			flow->flags |= FLOW_TRIAL;
			return true;
		}
		if (is_overdue(device->trial_at, now))
			change_trust(device, flow->generation, TRUST_LOST, LOSS_UNACKNOWLEDGED);
		return false;
	}
	if (device->trust != TRUST_PROVEN)
		return false;
	/*
	 * A prober may give up before it repeats its SYN; then the next connection finds that the watched one was never
	 * acknowledged. A flow watched before the device's trial proves nothing about the time since.
	 */
	if (port->watched_at < device->trial_at || !is_unacknowledged(seg, port)) {
		port->watched_at = now;
		port->watched_port = seg->flow.client_port;
	} else if (is_overdue(port->watched_at, now)) {
		change_trust(device, flow->generation, TRUST_LOST, LOSS_UNACKNOWLEDGED);
		return false;
	}
	return true;
}

/* Allows another trial if a flow was its device's trial and ends before it is known whether the answer arrived. */
static __always_inline void abandon_trial(const struct flow_key *key, const struct flow *flow)
{
	struct device *device;

	if ((flow->flags & (FLOW_TRIAL | FLOW_CONNECTED)) != FLOW_TRIAL)
		return;
	device = bpf_map_lookup_elem(&devices, &key->ifindex);
	if (device)
		__sync_val_compare_and_swap(&device->trial_at, flow->started_at, 0);
}

/* Notes that the client has received the answer to its SYN. */
static __always_inline void acknowledge(const struct segment *seg, struct flow *flow)
{
	struct device *device;

	set_flags(flow, FLOW_CONNECTED);
	if (!(flow->flags & FLOW_TRIAL))
		return;
	device = bpf_map_lookup_elem(&devices, &seg->flow.ifindex);
	if (!device)
		return;
	/* Connections cannot be handed over without observe. */
	if (device->observed)
		change_trust(device, flow->generation, TRUST_PROVEN, LOSS_NONE);
	else
		change_trust(device, flow->generation, TRUST_LOST, LOSS_UNOBSERVED);
}

/*
 * Reports whether the traffic of a port shows that it is served. Sets due if a TCP probe must reach the pod now,
 * whatever the traffic shows; requests are counted by their own endpoints.
 */
static __always_inline bool is_port_serving(const struct segment *seg, const struct flow *flow,
					    const struct evidence *port, const struct tally *tally, bool *due)
{
	struct endpoint_key key = endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_TCP, 0);
	const struct tally *tcp = bpf_map_lookup_elem(&endpoint_tallies, &key);

	*due = is_real_due(port, tcp);
	return !*due && is_serving(port, tally, tcp ? KIND_TCP : KIND_HTTP, flow->started_at);
}

/* Reports whether a connection may be taken. port, tally and withdrawn belong to the port. */
static __always_inline bool may_take(struct __sk_buff *skb, const struct segment *seg, struct device *device,
				     struct flow *flow, const struct evidence *port, struct tally *tally,
				     __u64 withdrawn)
{
	bool valid = port->observed_at > withdrawn;
	bool fresh = flow->started_at < port->fresh_until && valid;
	bool unanswered = tally && tally->asked_at;
	bool due = false, serving = false, listening;

	if (tally && valid && port->traffic_until)
		serving = is_port_serving(seg, flow, port, tally, &due);
	if (serving && (!fresh || unanswered))
		flow->flags |= FLOW_BY_TRAFFIC;
	listening = tally && is_listening(skb, seg, device, tally, flow, fresh && !unanswered && !due, serving);
	if (!fresh && !serving) {
		count(COUNT_PASSED_NOT_FRESH);
		return false;
	}
	if (due) {
		note_obstacle(tally, OBSTACLE_REAL_DUE);
		return false;
	}
	if (unanswered && !serving) {
		note_obstacle(tally, OBSTACLE_UNANSWERED);
		return false;
	}
	if (tally && !listening)
		return false;
	if (!tally || !is_trusted(seg, device, tally, flow)) {
		count(COUNT_PASSED_UNTRUSTED);
		return false;
	}
	return true;
}

/* Limits the MSS that we announce to the client to the pod's, because the two ends of a veth may differ in MTU. */
static __always_inline void limit_mss(const struct segment *seg, const struct device *device, struct flow *flow)
{
	__u32 headers = seg->l3_len + sizeof(struct tcphdr), most = device->pod_mtu;

	if (most > headers && flow->client_mss > most - headers)
		flow->client_mss = most - headers;
}

/* Notes the pod's MTU from its SYN-ACK, for later connections. */
static __always_inline void note_mtu(struct __sk_buff *skb, const struct segment *seg, const struct flow *flow)
{
	struct device *device = bpf_map_lookup_elem(&devices, &seg->flow.ifindex);
	__u32 mtu;
	__u16 mss;

	if (!device || device->generation != flow->generation || !parse_syn_options(skb, seg, &mss) || !mss)
		return;
	mtu = mss + seg->l3_len + sizeof(struct tcphdr);
	if (mtu <= 0xffff && device->pod_mtu != mtu)
		device->pod_mtu = mtu;
}

/* Returns a flow that begins with this SYN, in the scratch memory. It is not in the map yet. */
static __always_inline struct flow *new_flow(const struct segment *seg, const struct device *device,
					     struct scratch *scratch, __u64 owner, enum flow_state state)
{
	struct flow *flow = &scratch->flow;

	__builtin_memset(flow, 0, sizeof(*flow));
	flow->owner = owner;
	flow->client_isn = seg->seq;
	flow->state = state;
	flow->generation = device->generation;
	flow->started_at = bpf_ktime_get_boot_ns();
	flow->deadline = flow->started_at + CONNECTING_NS;
	return flow;
}

/* Decides, once and for all, whether a prober's new connection is taken. */
static __always_inline int decide(struct __sk_buff *skb, const struct segment *seg, __u64 cookie)
{
	struct device *device = bpf_map_lookup_elem(&devices, &seg->flow.ifindex);
	struct scratch *scratch = get_scratch();
	struct flow *flow;
	struct endpoint_key key;
	struct evidence port;
	struct tally *tally;
	__u64 withdrawn;
	bool taken;

	if (!device || !scratch)
		return PASS;
	flow = new_flow(seg, device, scratch, cookie, FLOW_OBSERVING);
	if (device->hook == HOOK_XDP)
		flow->flags = FLOW_XDP;
	key = endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_PORT, 0);
	tally = bpf_map_lookup_elem(&endpoint_tallies, &key);
	withdrawn = later(withdrawn_at(tally), device->withdrawn_at);
	if (!read_evidence(&key, &port)) {
		count(COUNT_PASSED_NOT_PROBED);
		return PASS;
	}
	/* Only the pod can honour data in a SYN (fast open) and options that we do not understand. */
	if (!parse_syn_options(skb, seg, &flow->client_mss) || seg->payload) {
		count(COUNT_PASSED_NOT_PARSABLE);
		return PASS;
	}
	taken = may_take(skb, seg, device, flow, &port, tally, withdrawn);
	if (taken) {
		flow->state = FLOW_TAKEN;
		flow->our_isn = bpf_get_prandom_u32();
		flow->evidence_at = port.observed_at;
		flow->deadline = flow->started_at + TAKEN_NS;
		limit_mss(seg, device, flow);
	} else {
		flow->flags &= ~FLOW_BY_TRAFFIC;
	}
	if (!add_flow(&seg->flow, flow)) {
		if (flow->flags & FLOW_TRIAL) /* the trial did not take place */
			__sync_val_compare_and_swap(&device->trial_at, flow->started_at, 0);
		count(COUNT_PASSED_FULL);
		return PASS;
	}
	if (taken)
		return answer_syn(skb, seg, flow);
	if (tally)
		tally->asked_at = flow->started_at;
	if (port.traffic_until) {
		key.kind = KIND_TCP;
		note_passed(&key);
	}
	return PASS;
}

/* Follows a connection of the daemon's own until the pod answers, if that says anything about a TCP endpoint. */
static __always_inline void follow_own(const struct segment *seg, __u64 cookie)
{
	struct device *device = bpf_map_lookup_elem(&devices, &seg->flow.ifindex);
	struct scratch *scratch = get_scratch();
	struct endpoint_key key;
	struct flow *flow;

	if (!sees_listeners || !device || !scratch)
		return;
	key = endpoint(seg->flow.ifindex, device->generation, seg->flow.pod_port, KIND_TCP, 0);
	if (!bpf_map_lookup_elem(&endpoint_evidence, &key))
		return;
	flow = new_flow(seg, device, scratch, cookie, FLOW_OWN);
	flow->deadline = flow->started_at + OWN_NS;
	add_flow(&seg->flow, flow);
}

static __always_inline int steer_syn(struct __sk_buff *skb, const struct segment *seg)
{
	__u32 zero = 0;
	struct prober_config *config = bpf_map_lookup_elem(&prober, &zero);
	__u64 cookie;

	/* A packet with an ingress device was forwarded or bridged, and not sent by a process in this namespace. */
	if (!config || skb->ingress_ifindex) {
		count(COUNT_PASSED_NOT_PROBER);
		return PASS;
	}
	if (config->own_sockets) {
		cookie = bpf_get_socket_cookie(skb);
		if (bpf_map_lookup_elem(&own_sockets, &cookie)) {
			count(COUNT_PASSED_OWN);
			follow_own(seg, cookie);
			return PASS;
		}
	}
	if (!is_prober(config, skb)) {
		count(COUNT_PASSED_NOT_PROBER);
		return PASS;
	}
	return decide(skb, seg, bpf_get_socket_cookie(skb));
}

/* Handles a SYN that a flow's owner repeats. */
static __always_inline int steer_syn_again(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	if (flow->state == FLOW_OBSERVING || flow->state == FLOW_OWN)
		return PASS;
	if (flow->state != FLOW_TAKEN)
		return drop_quietly(); /* a late duplicate: the client is connected */
	/*
	 * Repeat the same answer as long as the client may have received it: two delayed SYNs arrive in quick
	 * succession, and a different answer would break the connection.
	 */
	if (flow->flags & FLOW_CONNECTED || !is_overdue(flow->started_at, bpf_ktime_get_boot_ns()))
		return answer_syn(skb, seg, flow);
	lose_trust(seg->flow.ifindex, flow->generation, LOSS_SYN_REPEATED);
	flow->deadline = bpf_ktime_get_boot_ns() + CONNECTING_NS;
	flow->state = FLOW_OBSERVING;
	return PASS;
}

/* Returns the key of the endpoint that a connection's client has asked. */
static __always_inline struct endpoint_key asked_endpoint(const struct segment *seg, const struct flow *flow)
{
	return endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_HTTP, flow->question.hash);
}

/* Notes what a client asks the pod. Returns false if that is not a question, so that the connection teaches nothing. */
static __always_inline bool note_request(const struct segment *seg, struct flow *flow, const struct question *question)
{
	struct endpoint_key key;

	if (!question)
		return false;
	flow->question = *question;
	key = asked_endpoint(seg, flow);
	note_passed(&key);
	set_flags(flow, FLOW_REQUESTED);
	return true;
}

/*
 * Reports whether it still matters how the pod answers a request that its client has given up on. To traffic a timeout
 * is no evidence, so an error that comes too late for the client must not be missed.
 */
static __always_inline bool is_awaited(const struct segment *seg, const struct flow *flow)
{
	struct endpoint_key key = asked_endpoint(seg, flow);
	struct evidence e;

	return (flow->flags & (FLOW_REQUESTED | FLOW_ANSWERED)) == FLOW_REQUESTED && read_evidence(&key, &e) &&
	       bpf_ktime_get_boot_ns() < e.traffic_until;
}

/*
 * Shortens the life of a handed-over connection that its client has closed, if it is a probe: a prober sends nothing
 * after that, and a pod that hangs does not end the connection either. Other clients may still wait for a reply.
 */
static __always_inline void note_closed_probe(const struct segment *seg, struct flow *flow)
{
	struct endpoint_key key = asked_endpoint(seg, flow);

	if (flow->flags & FLOW_REQUESTED && bpf_map_lookup_elem(&endpoint_evidence, &key))
		set_deadline(flow, LATE_NS);
}

/* Notes a client's packet on a connection that was passed on. The packet itself is always passed on, too. */
static __always_inline void steer_observing(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	bool ends = seg->tcp_flags & (TCP_FIN | TCP_RST);

	/* A client that is still connecting resets the pod's leftover of an earlier connection and carries on. */
	if (seg->tcp_flags & TCP_RST && !(flow->flags & FLOW_CONNECTED) && seg->seq != flow->client_isn + 1)
		return;
	if (seg->payload && !(flow->flags & FLOW_REQUESTED) &&
	    !note_request(seg, flow, seg->seq == flow->client_isn + 1 ? read_question(skb, seg) : NULL))
		ends = true;
	record_packet(skb, seg, flow, 0);
	if (!ends)
		return;
	if (seg->tcp_flags & TCP_RST || !is_awaited(seg, flow)) {
		end_flow(&seg->flow, flow);
		return;
	}
	set_flags(flow, FLOW_DONE);
	set_deadline(flow, LATE_NS);
}

/* Ends a taken connection that its client has closed, with a reset, so that nothing is left behind. */
static __always_inline int end_taken(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	struct outgoing out = {
	    .seq = seg->ack,
	    .ack = seg->seq + seg->payload + 1,
	    .tcp_flags = TCP_RST | TCP_ACK,
	};
	__u32 flags = flow->flags;

	if (!(flags & FLOW_REQUESTED)) {
		struct endpoint_key key =
		    endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_TCP, 0);

		/* This was a TCP probe, and the answer to its SYN answered it. */
		note_answer(&key, bpf_map_lookup_elem(&endpoint_tallies, &key), flow->evidence_at, flow->started_at);
	}
	end_flow(&seg->flow, flow);
	return answer(skb, seg, (flags & FLOW_XDP) | FLOW_CONNECTED, &out, 0);
}

/* Answers a request and sets the verdict. Returns false if it is not a question or may not be answered. */
static __always_inline bool answer_request(struct __sk_buff *skb, const struct segment *seg, struct flow *flow,
					   const struct question *question, int *verdict)
{
	struct endpoint_key key = endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_PORT, 0);
	struct outgoing out = {
	    .seq = flow->our_isn + 1,
	    .ack = seg->seq + seg->payload,
	    /* Data and FIN in one segment: the prober never closes first, so it is not left in TIME_WAIT. */
	    .tcp_flags = TCP_PSH | TCP_FIN | TCP_ACK,
	    .window = FIRST_WINDOW,
	};
	bool again = flow->flags & FLOW_REQUESTED;
	struct tally *tally, *port;
	__u64 now, withdrawn, at;
	struct evidence e;

	/* This answer did not arrive, although the one to the SYN did, or the receiving CPU was held up. */
	if (again) {
		clear_flags(flow, FLOW_REQUESTED);
		if (is_overdue(flow->started_at, bpf_ktime_get_boot_ns())) {
			lose_trust(seg->flow.ifindex, flow->generation, LOSS_REQUEST_REPEATED);
			return false;
		}
	}
	if (seg->tcp_flags & TCP_FIN || !question)
		return false;
	port = bpf_map_lookup_elem(&endpoint_tallies, &key);
	withdrawn = later(withdrawn_at(port), pod_withdrawn_at(&key.device));
	key.hash = question->hash;
	key.kind = KIND_HTTP;
	tally = bpf_map_lookup_elem(&endpoint_tallies, &key);
	if (!read_evidence(&key, &e) || e.check != question->check)
		return false;
	now = bpf_ktime_get_boot_ns();
	if (e.result != RESULT_SUCCESS || e.observed_at <= withdrawn || e.observed_at <= withdrawn_at(tally))
		return false;
	/* Within the grace period, what held at the SYN counts. */
	at = now - flow->started_at < TAKEN_GRACE_NS ? flow->started_at : now;
	/* A connection taken only because of traffic is for the endpoints that traffic vouches for. */
	if ((at >= e.fresh_until || flow->flags & FLOW_BY_TRAFFIC) && (!port || !is_serving(&e, port, KIND_HTTP, at)))
		return false;
	if (!again && is_real_due(&e, tally))
		return false;
	if (!again)
		note_answer(&key, tally, e.observed_at, now);
	set_flags(flow, FLOW_REQUESTED);
	*verdict = answer(skb, seg, flow->flags, &out, e.status);
	return true;
}

static __always_inline int steer_taken(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	__u32 offset = seg->seq - flow->client_isn - 1; /* into the client's data */
	const struct question *question;
	int verdict;

	if (!(flow->flags & FLOW_CONNECTED))
		acknowledge(seg, flow);
	if (seg->tcp_flags & TCP_RST) {
		end_flow(&seg->flow, flow);
		return drop_quietly();
	}
	if (!seg->payload && seg->tcp_flags & TCP_FIN) {
		if (flow->flags & FLOW_REQUESTED || offset == 0)
			return end_taken(skb, seg, flow);
		return drop_quietly(); /* preceding data was lost */
	}
	if (!seg->payload) {
		/* A keep-alive leads to a handover: the client may be waiting for a server that speaks first. */
		if (offset != (__u32)-1 || flow->flags & FLOW_REQUESTED)
			return drop_quietly();
		set_flags(flow, FLOW_DONE);
		return replay_syn(skb, seg, flow);
	}
	/* Wait for the first byte, which later data may have overtaken, and never hand over a client with an answer. */
	if (offset != 0 || seg->ack != flow->our_isn + 1)
		return drop_quietly();
	question = read_question(skb, seg);
	if (answer_request(skb, seg, flow, question, &verdict))
		return verdict;
	if (note_request(seg, flow, question))
		record_packet(skb, seg, flow, 0);
	else
		set_flags(flow, FLOW_DONE);
	store(skb, seg, flow, 0); /* if this fails, the client will retransmit */
	return replay_syn(skb, seg, flow);
}

static __always_inline int steer_handing(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	__u32 offset = seg->seq - flow->client_isn - 1;

	record_packet(skb, seg, flow, 0);
	if (seg->tcp_flags & TCP_RST) {
		end_flow(&seg->flow, flow);
		return drop_quietly();
	}
	/* The client repeats its first byte, so the pod has not answered the SYN for a while. */
	if (offset + 1 <= 1 && (seg->payload || offset == (__u32)-1))
		return replay_syn(skb, seg, flow);
	if (flow->flags & FLOW_STORED && (seg->payload || seg->tcp_flags & TCP_FIN))
		store(skb, seg, flow, offset);
	return drop_quietly();
}

/* Notes that one of the FINs is acknowledged, and reports whether both are. */
static __always_inline bool all_acked(struct flow *flow, enum flow_flag acked)
{
	const __u32 all = FLOW_CLIENT_FIN_ACKED | FLOW_POD_FIN_ACKED;

	return (set_flags(flow, acked) & all) == all;
}

/* Translates a client's packet. The pod's sequence numbers are pod_isn - our_isn ahead of those the client sees. */
static __always_inline int steer_handed(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	__u32 tcp = ETH_HLEN + seg->l3_len, ack = seg->ack + flow->pod_isn - flow->our_isn;
	__be32 told = bpf_htonl(seg->ack), meant = bpf_htonl(ack);

	if (seg->tcp_flags & TCP_SYN)
		return drop_quietly();
	record_packet(skb, seg, flow, 0);
	if (seg->tcp_flags & TCP_ACK) {
		if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), told, meant, sizeof(meant)) ||
		    bpf_skb_store_bytes(skb, tcp + offsetof(struct tcphdr, ack_seq), &meant, sizeof(meant),
					BPF_F_RECOMPUTE_CSUM))
			return DROP;
	}
	skb->tc_index = HANDLED;
	flow->deadline = bpf_ktime_get_boot_ns() + HANDED_NS;
	if (seg->tcp_flags & TCP_FIN) {
		flow->client_fin = seg->seq + seg->payload + 1;
		set_flags(flow, FLOW_CLIENT_FIN);
	}
	if (flow->flags & FLOW_CLIENT_FIN)
		note_closed_probe(seg, flow);
	if (seg->tcp_flags & TCP_RST ||
	    (flow->flags & FLOW_POD_FIN && ack == flow->pod_fin && all_acked(flow, FLOW_POD_FIN_ACKED)))
		end_flow(&seg->flow, flow);
	return PASS;
}

/*
 * Reports whether one of our programs has already handled the packet. The mark is never cleared, because during a
 * promotion each program is attached twice, and both copies must ignore the packet.
 */
static __always_inline bool is_handled(const struct __sk_buff *skb)
{
	return skb->tc_index == HANDLED || skb->tc_index == HANDLED_TRIAL;
}

SEC("tc")
int steer(struct __sk_buff *skb)
{
	struct segment seg = {};
	struct flow *flow = NULL;

	if (!parse(skb, &seg, false) || is_handled(skb))
		return PASS;
	if (seg.may_have_flow)
		flow = bpf_map_lookup_elem(&flows, &seg.flow);
	if (flow && (!is_from_owner(skb, flow) || (begins(seg.tcp_flags) && seg.seq != flow->client_isn))) {
		abandon_trial(&seg.flow, flow);
		end_flow(&seg.flow, flow); /* another connection on the same ports */
		flow = NULL;
	}
	if (begins(seg.tcp_flags))
		return flow ? steer_syn_again(skb, &seg, flow) : steer_syn(skb, &seg);
	if (!flow)
		return PASS;
	switch (flow->state) {
	case FLOW_OBSERVING:
		steer_observing(skb, &seg, flow);
		return PASS;
	case FLOW_TAKEN:
		return steer_taken(skb, &seg, flow);
	case FLOW_HANDING:
		return steer_handing(skb, &seg, flow);
	case FLOW_HANDED:
		return steer_handed(skb, &seg, flow);
	}
	return PASS;
}

/* Notes that the pod refused or reset a connection. */
static __always_inline void note_reset(const struct segment *seg, const struct flow *flow)
{
	struct endpoint_key port = endpoint(seg->flow.ifindex, flow->generation, seg->flow.pod_port, KIND_PORT, 0);

	/* Once the pod has answered, or the client has closed, a reset alone proves nothing. A refusal always does. */
	if (flow->state == FLOW_HANDING || !(flow->flags & (FLOW_DONE | FLOW_ANSWERED)))
		withdraw(&port, WITHDRAWN_RESET, COUNT_WITHDRAWN_RESET);
}

/* Withdraws the evidence of a question that the pod answers with an error, even if its client has given up on it. */
static __always_inline void note_status(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	struct endpoint_key key;

	if ((flow->flags & (FLOW_REQUESTED | FLOW_ANSWERED)) != FLOW_REQUESTED || !seg->payload ||
	    seg->seq != flow->pod_isn + 1)
		return;
	set_flags(flow, FLOW_ANSWERED);
	if (parse_status(skb, seg) < 300)
		return;
	key = asked_endpoint(seg, flow);
	withdraw(&key, WITHDRAWN_STATUS, COUNT_WITHDRAWN_STATUS);
}

/* Notes the pod's side of a connection that was passed on. */
static __always_inline void observe_passed(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	if (seg->tcp_flags & TCP_RST) {
		note_answered(seg, flow);
		note_reset(seg, flow);
		record_packet(skb, seg, flow, 1);
		end_flow(&seg->flow, flow);
		return;
	}
	if (seg->tcp_flags & TCP_SYN) {
		if (seg->ack != flow->client_isn + 1)
			return; /* belongs to another connection on the same ports */
		flow->pod_isn = seg->seq;
		set_flags(flow, FLOW_CONNECTED);
		set_deadline(flow, OBSERVING_NS);
		note_mtu(skb, seg, flow);
		note_connected(skb, seg, flow);
	}
	if (!(flow->flags & FLOW_CONNECTED))
		return;
	note_status(skb, seg, flow);
	record_packet(skb, seg, flow, 1);
	if (flow->flags & FLOW_DONE && (flow->flags & FLOW_ANSWERED || seg->tcp_flags & TCP_FIN))
		end_flow(&seg->flow, flow);
}

/*
 * Notes the pod's reply to the daemon's SYN. judge counts the connection as accepted once it has left the queue. So the
 * daemon must not reset a connection before it has sent its request: with TCP_DEFER_ACCEPT that would take it off the
 * queue although it was not accepted.
 */
static __always_inline void observe_own(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	if (!(seg->tcp_flags & (TCP_SYN | TCP_RST)) || seg->ack != flow->client_isn + 1)
		return;
	if (seg->tcp_flags & TCP_SYN)
		note_connected(skb, seg, flow);
	end_flow(&seg->flow, flow);
}

/* Turns the pod's SYN-ACK into the ACK for it, which carries what the client has sent so far. */
static __always_inline int accept_handover(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	struct outgoing out = {
	    .seq = seg->ack,
	    .ack = seg->seq + 1,
	    .tcp_flags = TCP_ACK,
	    .window = flow->client_window, /* neither side has been granted scaling */
	    .back = true,
	};
	struct stored *stored = NULL;
	__u64 owner = flow->owner;

	record_packet(skb, seg, flow, 1);
	if (flow->state == FLOW_HANDING) {
		note_mtu(skb, seg, flow);
		note_connected(skb, seg, flow);
		__sync_lock_test_and_set(&flow->pod_isn, seg->seq); /* a barrier: must be set before steer uses it */
		flow->state = FLOW_HANDED;
		set_deadline(flow, HANDED_NS); /* after the state: see replay_syn */
	}
	if (flow->flags & FLOW_STORED)
		stored = bpf_map_lookup_elem(&requests, &seg->flow);
	if (stored && stored->len <= STORED_MAX) {
		out.payload = stored->len;
		out.payload_sum = stored->sum;
		out.tcp_flags |= TCP_PSH | (stored->fin ? TCP_FIN : 0);
		if (!emit(skb, seg->l3_len, &out, stored->bytes, STORED_MAX))
			return DROP;
		/* Drop the packet if the memory has become another connection's. The client will repeat its data. */
		if (stored != bpf_map_lookup_elem(&requests, &seg->flow) || stored->owner != owner ||
		    stored->len != out.payload)
			return DROP;
		if (out.tcp_flags & TCP_FIN) {
			flow->client_fin = out.seq + out.payload + 1;
			set_flags(flow, FLOW_CLIENT_FIN);
			note_closed_probe(seg, flow);
		}
	} else if (!emit(skb, seg->l3_len, &out, NULL, 0)) {
		return DROP;
	}
	skb->tc_index = HANDLED;
	return bpf_redirect(skb->ifindex, 0);
}

/* Turns the pod's refusal into a reset of the client's connection with us. */
static __always_inline int refuse_handover(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	struct outgoing out = {
	    .seq = flow->our_isn + 1,
	    .ack = seg->ack,
	    .tcp_flags = TCP_RST | TCP_ACK,
	};

	note_reset(seg, flow);
	record_packet(skb, seg, flow, 1);
	end_flow(&seg->flow, flow);
	skb->tc_index = HANDLED;
	return emit(skb, seg->l3_len, &out, NULL, 0) ? PASS : DROP;
}

/*
 * Resets a stale connection that the pod still has on these ports because its client vanished: the pod answered the
 * replayed SYN with an ACK for that connection. A client in SYN-SENT would do the same (RFC 9293, section 3.10.7.3),
 * and the pod accepts the next SYN.
 */
static __always_inline int reset_stale(struct __sk_buff *skb, const struct segment *seg)
{
	struct outgoing out = {.seq = seg->ack, .tcp_flags = TCP_RST, .back = true};

	if (!emit(skb, seg->l3_len, &out, NULL, 0))
		return DROP;
	skb->tc_index = HANDLED;
	return bpf_redirect(skb->ifindex, 0);
}

/* Handles what the pod sends until it has answered the replayed SYN. */
static __always_inline int observe_handing(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	if (!(seg->tcp_flags & TCP_ACK))
		return PASS;
	if (seg->ack != flow->client_isn + 1) {
		if (seg->tcp_flags & TCP_SYN)
			set_flags(flow, FLOW_CONTESTED);
		return seg->tcp_flags & TCP_RST || flow->flags & FLOW_CONTESTED ? PASS : reset_stale(skb, seg);
	}
	if (seg->tcp_flags & TCP_RST)
		return refuse_handover(skb, seg, flow);
	if (seg->tcp_flags & TCP_SYN)
		return accept_handover(skb, seg, flow);
	return PASS;
}

/* Translates a packet from the pod, and notes what it reveals about the probe. */
static __always_inline int observe_handed(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	__u32 tcp = ETH_HLEN + seg->l3_len;
	__be32 meant = bpf_htonl(seg->seq), told = bpf_htonl(seg->seq - flow->pod_isn + flow->our_isn);

	if (seg->tcp_flags & TCP_SYN) {
		if (seg->seq == flow->pod_isn && seg->ack == flow->client_isn + 1)
			return accept_handover(skb, seg, flow); /* our ACK was lost */
		end_flow(&seg->flow, flow);			/* another connection on the same ports */
		return PASS;
	}
	if (seg->tcp_flags & TCP_ACK && seg->ack != flow->client_isn + 1)
		forget_stored(&seg->flow, flow); /* acknowledged */
	if (seg->tcp_flags & TCP_RST)
		note_reset(seg, flow);
	else
		note_status(skb, seg, flow);
	record_packet(skb, seg, flow, 1);
	if (seg->tcp_flags & TCP_FIN) {
		flow->pod_fin = seg->seq + seg->payload + 1;
		set_flags(flow, FLOW_POD_FIN);
	}
	if (seg->tcp_flags & TCP_RST ||
	    (flow->flags & FLOW_CLIENT_FIN && seg->ack == flow->client_fin && all_acked(flow, FLOW_CLIENT_FIN_ACKED)))
		end_flow(&seg->flow, flow);

	if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), meant, told, sizeof(told)) ||
	    bpf_skb_store_bytes(skb, tcp + offsetof(struct tcphdr, seq), &told, sizeof(told), BPF_F_RECOMPUTE_CSUM))
		return DROP;
	skb->tc_index = HANDLED;
	return PASS;
}

/* Notes that the answer of a trial has passed observe. */
static __always_inline void note_trial_answer(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct device *device;

	if (skb->tc_index != HANDLED_TRIAL)
		return;
	device = bpf_map_lookup_elem(&devices, &ifindex);
	if (device)
		device->observed = 1;
}

/*
 * Restores the Ethernet header that generic XDP hides on a veth since 6.9: it copies the packet without its mac_len
 * (skb_pp_cow_data, __copy_skb_header), so that at tc ingress the packet begins at its network header, for us and for
 * later programs. The header is still in front of it. Returns false on failure.
 */
static __always_inline bool restore_mac(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	__u16 lost[ETH_HLEN / 2], first[ETH_HLEN / 2], differ = 0;

	if ((void *)(eth + 1) <= data_end && eth->h_proto == skb->protocol)
		return true;
	/* Either the header is hidden, or it has a length instead of an EtherType (IEEE 802.3). */
	if (bpf_skb_load_bytes_relative(skb, 0, lost, ETH_HLEN, BPF_HDR_START_MAC))
		return false;
	if (!bpf_skb_load_bytes(skb, 0, first, ETH_HLEN)) {
		for (int i = 0; i < ETH_HLEN / 2; i++)
			differ |= lost[i] ^ first[i];
		if (!differ)
			return true;
	}
	return !bpf_skb_change_head(skb, ETH_HLEN, 0) && !bpf_skb_store_bytes(skb, 0, lost, ETH_HLEN, 0);
}

SEC("tc")
int observe(struct __sk_buff *skb)
{
	struct segment seg = {};
	struct flow *flow;

	if (!restore_mac(skb))
		return PASS;
	note_trial_answer(skb);
	if (is_handled(skb) || !parse(skb, &seg, true))
		return PASS;
	note_traffic(skb, &seg);
	if (!seg.may_have_flow)
		return PASS;
	flow = bpf_map_lookup_elem(&flows, &seg.flow);
	if (!flow)
		return PASS;
	switch (flow->state) {
	case FLOW_OBSERVING:
		observe_passed(skb, &seg, flow);
		return PASS;
	case FLOW_HANDING:
		return observe_handing(skb, &seg, flow);
	case FLOW_HANDED:
		return observe_handed(skb, &seg, flow);
	case FLOW_OWN:
		observe_own(skb, &seg, flow);
		return PASS;
	}
	return PASS;
}

/*
 * Makes the answer that steer ordered. l3_len is the length of the network header. Returns false without setting a
 * verdict if the packet carries no order.
 */
static __always_inline bool obey(struct xdp_md *ctx, __u32 l3_len, int *verdict)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct tcphdr *tcp = data + ETH_HLEN + l3_len;
	void *room = tcp + 1;
	__u64 length = data_end - data, sum;
	struct outgoing out = {.back = true};
	struct order order;
	__u32 reply;

	/* The verifier accepts only 64-bit arithmetic on packet pointers, which the compiler would narrow below. */
	asm volatile("" : "+r"(length));
	if (room + STEERED_ROOM > data_end)
		return false;
	__builtin_memcpy(&order, room, sizeof(order));
	if (order.token != order_token)
		return false; /* a frame of the pod's own with this EtherType */
	out.seq = order.seq;
	out.ack = order.ack;
	out.mss = order.mss;
	out.window = order.window;
	out.tcp_flags = order.tcp_flags;
	reply = order.status - STATUS_MIN;
	if (reply <= STATUS_MAX - STATUS_MIN) {
		out.payload = replies[reply].len;
		out.payload_sum = replies[reply].sum;
		__builtin_memcpy(room, (const void *)replies[reply].bytes, REPLY_MAX);
	}
	eth->h_proto = l3_len == sizeof(struct iphdr) ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	sum = write_headers(eth, l3_len, &out);
	tcp->check = ~fold(sum + pseudo_sum(eth + 1, l3_len, tcp_len_of(&out) + out.payload));
	length = ETH_HLEN + l3_len + tcp_len_of(&out) + out.payload - length;
	*verdict = bpf_xdp_adjust_tail(ctx, (int)length) ? XDP_DROP : XDP_PASS;
	return true;
}

SEC("xdp.frags")
int respond(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	__u8 *version = (void *)(eth + 1);
	int verdict = XDP_PASS;

	if ((void *)(version + 1) > data_end || eth->h_proto != bpf_htons(ETH_P_STEERED))
		return XDP_PASS;
	if (*version >> 4 == 4)
		obey(ctx, sizeof(struct iphdr), &verdict);
	else
		obey(ctx, sizeof(struct ipv6hdr), &verdict);
	return verdict;
}

/* Removes a flow if it is past its deadline, or its device is detached. */
static long sweep_flow(void *map, const struct flow_key *key, struct flow *flow, __u64 *now)
{
	__u32 ifindex = key->ifindex;

	if ((__s64)(*now - flow->deadline) <= 0 && bpf_map_lookup_elem(&devices, &ifindex))
		return 0;
	if (flow->flags & FLOW_STORED)
		bpf_map_delete_elem(&requests, key);
	if (!bpf_map_delete_elem(&flows, key)) {
		__sync_fetch_and_add(flow_port_slot(key->client_port), -1);
		count(COUNT_FLOWS_EXPIRED);
	}
	return 0;
}

SEC("syscall")
int sweep(void *ctx)
{
	__u64 now = bpf_ktime_get_boot_ns();

	bpf_for_each_map_elem(&flows, sweep_flow, &now, 0);
	return 0;
}

/*
 * Voids all evidence about a pod when one of its listening sockets is closed, by its process or by the kernel because
 * the process ended. Voiding only that port would not suffice, because the process that owns the socket of a port need
 * not be the one that answers (a sidecar).
 */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(watch, const struct sock *sk, int oldstate, int newstate)
{
	/* The socket of an accepted connection starts as a copy of the listening one: it leaves LISTEN, too, but not
	 * for CLOSE. */
	if (oldstate == STATE_LISTEN && newstate == STATE_CLOSE)
		note_closed(sk);
	return 0;
}

/* Marks the sockets of the prober's process. The daemon attaches it to the cgroup that the prober shares. */
SEC("cgroup/sock_create")
int mark(struct bpf_sock *sk)
{
	__u32 zero = 0, *creator;
	struct prober_config *config = bpf_map_lookup_elem(&prober, &zero);

	if (!config || !config->pid || sk->type != SOCK_STREAM || current_pid(config->pid_namespace) != config->pid)
		return 1; /* the socket may be created */
	creator = bpf_sk_storage_get(&prober_sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (creator)
		*creator = config->pid;
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
