// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * Two programs on the host-side veth of a pod, both in the host's network namespace (ARCHITECTURE.md has a picture):
 *
 *   steer, tc egress: sees what the host sends to the pod. Decides for each packet of a prober's connection and, where
 *   the kernel is to answer, writes an order behind the TCP header and redirects the packet into the receive path of
 *   the same device.
 *
 *   respond, XDP: obeys orders, and sees what the pod sends. Reports the outcome of probes that were passed on, and
 *   translates sequence numbers of connections that were handed to the pod.
 *
 * And one for the whole machine:
 *
 *   watch, at the trace point inet_sock_set_state: sees pods' listening sockets close, and voids their ports' evidence.
 */
#include "abi.h"
#include "parse.h"
#include "reply.h"

#define PASS TC_ACT_UNSPEC /* TCX_NEXT: whoever comes after us decides */
#define DROP TC_ACT_SHOT

/* Sockets of the kernel itself (a RST or an ACK for a connection whose socket is gone) belong to the root cgroup, or
 * none. */
#define ROOT_CGROUP_ID 1

#define OUR_WINDOW 64240

static __always_inline bool is_prober(__u64 cgroup_id)
{
	__u32 zero = 0;
	struct prober_config *config = bpf_map_lookup_elem(&prober, &zero);

	if (!config || !cgroup_id)
		return false;
	for (__u32 i = 0; i < PROBER_CGROUPS_MAX; i++)
		if (config->cgroup_ids[i] == cgroup_id)
			return true;
	return config->any_local;
}

static __always_inline struct evidence *find_evidence(__u32 ifindex, __u16 port, __u8 kind, __u64 path_hash)
{
	struct endpoint_key key = {.port = port, .kind = kind, .path_hash = path_hash};
	void *pod = bpf_map_lookup_elem(&pod_evidence, &ifindex);

	return pod ? bpf_map_lookup_elem(pod, &key) : NULL;
}

static __always_inline struct tally *find_tally(__u32 ifindex, __u16 port, __u8 kind, __u64 path_hash)
{
	struct endpoint_key key = {.port = port, .kind = kind, .path_hash = path_hash};
	void *pod = bpf_map_lookup_elem(&pod_tallies, &ifindex);

	return pod ? bpf_map_lookup_elem(pod, &key) : NULL;
}

/* When evidence of this port was last voided. Without a tally it cannot be known, so nothing is valid. */
static __always_inline __u64 withdrawn_at(__u32 ifindex, __u16 port)
{
	struct tally *tally = find_tally(ifindex, port, KIND_PORT, 0);

	return tally ? tally->withdrawn_at : ~0ULL;
}

/* May a connection to this port be taken now? */
static __always_inline bool port_is_fresh(__u32 ifindex, __u16 number, const struct evidence *port, __u64 now)
{
	return now < port->fresh_until && port->observed_at > withdrawn_at(ifindex, number);
}

/* cause: of enum withdrawal_cause; counter: the one that is of this cause. */
static __always_inline void withdraw(__u32 ifindex, __u16 number, __u8 cause, __u32 counter)
{
	struct tally *tally = find_tally(ifindex, number, KIND_PORT, 0);
	struct evidence *port = find_evidence(ifindex, number, KIND_PORT, 0);
	__u64 now = bpf_ktime_get_boot_ns();

	if (!tally)
		return;
	if (port && port_is_fresh(ifindex, number, port, now))
		count(counter);
	tally->withdrawn_at = now;
	tally->withdrawn_cause = cause;
}

/* May a request on a taken connection be answered with this evidence? Freshness counts at the SYN, within the grace. */
static __always_inline bool may_answer(const struct flow_key *key, const struct flow *flow, const struct evidence *e,
				       __u64 now)
{
	if (e->result != RESULT_SUCCESS || e->observed_at <= withdrawn_at(key->ifindex, key->pod_port))
		return false;
	return now < e->fresh_until || (flow->started_at < e->fresh_until && now - flow->started_at < TAKEN_GRACE_NS);
}

static __always_inline void report(const struct flow_key *key, const struct flow *flow, __u8 event, __u8 kind,
				   __u64 now)
{
	struct outcome *o = bpf_ringbuf_reserve(&outcomes, sizeof(*o), 0);

	if (!o) {
		count(COUNT_OUTCOMES_LOST);
		return;
	}
	__builtin_memset(o, 0, sizeof(*o));
	o->observed_at = now;
	o->duration = now - flow->started_at;
	o->path_hash = kind == KIND_HTTP ? flow->path_hash : 0;
	o->ifindex = key->ifindex;
	o->port = key->pod_port;
	o->status = flow->status;
	o->kind = kind;
	o->event = event;
	bpf_ringbuf_submit(o, 0);
	count(COUNT_OBSERVED);
}

/* Sends the packet into the device's receive path, with an order. Its payload and options are no longer needed. */
static __always_inline int send_order(struct __sk_buff *skb, const struct segment *seg, struct order *order)
{
	__u32 tcp_end = ETH_HLEN + seg->l3_len + sizeof(struct tcphdr);
	__be16 proto = bpf_htons(ETH_P_STEERED);

	order->token = order_token;
	/* Grown here, where it always works; this also undoes segmentation offload, clones and fragments. */
	if (bpf_skb_change_tail(skb, tcp_end + STEERED_ROOM, 0) ||
	    bpf_skb_store_bytes(skb, tcp_end, order, sizeof(*order), 0) ||
	    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto), 0))
		return DROP;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/* The client would take TC_ACT_SHOT for congestion; a packet that is consumed quietly is dropped by respond. */
static __always_inline int drop_quietly(struct __sk_buff *skb, const struct segment *seg)
{
	struct order order = {.verdict = ORDER_DROP};

	return send_order(skb, seg, &order);
}

static __always_inline int send_syn_ack(struct __sk_buff *skb, const struct segment *seg, const struct flow *flow)
{
	struct order order = {
	    .verdict = ORDER_TO_CLIENT,
	    .seq = flow->our_isn,
	    .ack = flow->client_isn + 1,
	    .tcp_flags = TCP_SYN | TCP_ACK,
	    /* The client's own: it names what the way to the pod can carry, and is what the pod is offered. */
	    .mss = flow->client_mss,
	    .window = OUR_WINDOW,
	};

	return send_order(skb, seg, &order);
}

/* Replays the client's SYN towards the pod: the connection is handed over. */
static __always_inline int replay_syn(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	struct order order = {
	    .verdict = ORDER_TO_POD,
	    .seq = flow->client_isn,
	    .tcp_flags = TCP_SYN,
	    .mss = flow->client_mss,
	    .window = seg->window,
	};

	if (flow->state == FLOW_TAKEN) {
		flow->state = FLOW_HANDING;
		count(COUNT_HANDED_OVER);
	}
	return send_order(skb, seg, &order);
}

static __always_inline bool is_own(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);

	return cookie && bpf_map_lookup_elem(&own_sockets, &cookie);
}

/*
 * The client repeats its SYN although it was answered, so respond is not there: the pod shall have the connection. Not
 * if the client may have our answer: two SYNs that were held up on the way come one right after the other, and another
 * answer than the first would break the connection.
 */
static __always_inline bool is_unanswered(const struct flow *flow)
{
	return flow->state == FLOW_TAKEN && !(flow->flags & FLOW_CONNECTED) &&
	       bpf_ktime_get_boot_ns() - flow->started_at > ANSWER_LOST_NS;
}

/* A SYN: the one moment at which it is decided whether a connection is taken. */
static __always_inline int steer_syn(struct __sk_buff *skb, const struct segment *seg, bool prober)
{
	struct flow *old = bpf_map_lookup_elem(&flows, &seg->flow);
	struct flow flow = {.client_isn = seg->seq};
	struct evidence *port;
	bool fresh, unanswered;

	if (prober && is_own(skb)) {
		count(COUNT_PASSED_OWN);
		prober = false;
	}
	if (old && old->client_isn == seg->seq && prober && !is_unanswered(old)) { /* a retransmission */
		if (old->state == FLOW_TAKEN)
			return send_syn_ack(skb, seg, old);
		return old->state == FLOW_OBSERVING ? PASS : drop_quietly(skb, seg);
	}
	unanswered = old && old->client_isn == seg->seq && is_unanswered(old);
	if (old)
		bpf_map_delete_elem(&flows, &seg->flow);
	if (!prober)
		return PASS;

	port = find_evidence(seg->flow.ifindex, seg->flow.pod_port, KIND_PORT, 0);
	if (!port) {
		count(COUNT_PASSED_NOT_PROBED);
		return PASS;
	}
	flow.started_at = bpf_ktime_get_boot_ns();
	fresh = !unanswered && port_is_fresh(seg->flow.ifindex, seg->flow.pod_port, port, flow.started_at);
	/* Data on a SYN (fast open) and options that would have to be honoured are the pod's to answer. */
	if (!parse_syn_options(skb, seg, &flow.client_mss) || seg->payload) {
		count(COUNT_PASSED_NOT_PARSABLE);
		return PASS;
	}
	flow.state = fresh ? FLOW_TAKEN : FLOW_OBSERVING;
	flow.our_isn = bpf_get_prandom_u32();
	if (!fresh)
		count(COUNT_PASSED_NOT_FRESH);
	if (bpf_map_update_elem(&flows, &seg->flow, &flow, BPF_ANY) || !fresh)
		return PASS;
	return send_syn_ack(skb, seg, &flow);
}

/* A client's packet on a connection that was passed on. It goes on, whatever is noted. */
static __always_inline void observe_client(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	if (seg->tcp_flags & (TCP_FIN | TCP_RST)) {
		__u64 now = bpf_ktime_get_boot_ns();

		/* The exchange is complete only now: how long it took decides whether the prober calls it a success. */
		if (flow->status)
			report(&seg->flow, flow, OUTCOME_STATUS, KIND_HTTP, now);
		else if (flow->flags & FLOW_REQUESTED)
			report(&seg->flow, flow, OUTCOME_NO_ANSWER, KIND_HTTP, now);
		else if (flow->flags & FLOW_CONNECTED)
			report(&seg->flow, flow, OUTCOME_CONNECTED, KIND_TCP, now);
		else
			report(&seg->flow, flow, OUTCOME_NO_ANSWER, KIND_PORT, now);
		bpf_map_delete_elem(&flows, &seg->flow);
		return;
	}
	if (!seg->payload || flow->flags & FLOW_REQUESTED)
		return;
	if (seg->seq != flow->client_isn + 1 || !parse_request(skb, seg, &flow->path_hash)) {
		count(COUNT_PASSED_NOT_PARSABLE);
		bpf_map_delete_elem(&flows, &seg->flow);
	} else if (!find_evidence(seg->flow.ifindex, seg->flow.pod_port, KIND_HTTP, flow->path_hash)) {
		count(COUNT_PASSED_NOT_PROBED);
		bpf_map_delete_elem(&flows, &seg->flow);
	} else {
		flow->flags |= FLOW_REQUESTED;
	}
}

/* The client is done with a connection that the pod knows nothing of: reset it, so that nothing is left of it. */
static __always_inline int end_taken(struct __sk_buff *skb, const struct segment *seg, const struct flow *flow)
{
	struct order order = {
	    .verdict = ORDER_TO_CLIENT,
	    .seq = seg->ack,
	    .ack = seg->seq + seg->payload + 1,
	    .tcp_flags = TCP_RST | TCP_ACK,
	};

	if (!(flow->flags & FLOW_REQUESTED))
		order.answers = KIND_TCP;
	bpf_map_delete_elem(&flows, &seg->flow);
	return send_order(skb, seg, &order);
}

static __always_inline int answer_request(struct __sk_buff *skb, const struct segment *seg, struct flow *flow,
					  __u64 path_hash)
{
	struct order order = {
	    .verdict = ORDER_TO_CLIENT,
	    .path_hash = path_hash,
	    .seq = flow->our_isn + 1,
	    .ack = seg->seq + seg->payload,
	    /* Data and FIN in one segment: the prober never closes first, so no TIME_WAIT is left. */
	    .tcp_flags = TCP_PSH | TCP_FIN | TCP_ACK,
	    .window = OUR_WINDOW,
	    .with_reply = true,
	};

	if (!(flow->flags & FLOW_REQUESTED))
		order.answers = KIND_HTTP;
	flow->flags |= FLOW_REQUESTED;
	return send_order(skb, seg, &order);
}

static __always_inline int steer_taken(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	__u32 offset = seg->seq - flow->client_isn - 1; /* into the client's data */
	struct evidence *e;
	__u64 path_hash;

	flow->flags |= FLOW_CONNECTED;
	if (seg->tcp_flags & TCP_RST) {
		bpf_map_delete_elem(&flows, &seg->flow);
		return drop_quietly(skb, seg);
	}
	if (!seg->payload && seg->tcp_flags & TCP_FIN) {
		if (flow->flags & FLOW_REQUESTED || offset == 0)
			return end_taken(skb, seg, flow);
		return drop_quietly(skb, seg); /* something before it was lost */
	}
	if (!seg->payload) {
		/* A keep-alive: the client waits, perhaps for a server that speaks first. */
		if (offset == (__u32)-1)
			return replay_syn(skb, seg, flow);
		return drop_quietly(skb, seg);
	}
	if (offset == 0 && !(seg->tcp_flags & TCP_FIN) && parse_request(skb, seg, &path_hash)) {
		e = find_evidence(seg->flow.ifindex, seg->flow.pod_port, KIND_HTTP, path_hash);
		if (e && may_answer(&seg->flow, flow, e, bpf_ktime_get_boot_ns()))
			return answer_request(skb, seg, flow, path_hash);
	}
	/* Later data may overtake the first; only the first can be retransmitted into the new connection. And a client
	 * that has had an answer is not handed over any more. */
	if (offset != 0 || seg->ack != flow->our_isn + 1)
		return drop_quietly(skb, seg);
	return replay_syn(skb, seg, flow);
}

static __always_inline int steer_handing(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	if (seg->tcp_flags & TCP_RST) {
		bpf_map_delete_elem(&flows, &seg->flow);
		return drop_quietly(skb, seg);
	}
	/* The first byte again, so the pod has not answered the SYN for a while. */
	if (seg->seq - flow->client_isn <= 1 && (seg->payload || seg->seq == flow->client_isn))
		return replay_syn(skb, seg, flow);
	return drop_quietly(skb, seg);
}

/* The pod's sequence numbers are pod_isn - our_isn ahead of what the client has been told. */
static __always_inline int steer_handed(struct __sk_buff *skb, const struct segment *seg, struct flow *flow)
{
	__u32 tcp = ETH_HLEN + seg->l3_len;
	__be32 told = bpf_htonl(seg->ack), meant;
	__u32 ack = seg->ack + flow->pod_isn - flow->our_isn;
	const __u8 all_acked = FLOW_CLIENT_FIN_ACKED | FLOW_POD_FIN_ACKED;

	if (seg->tcp_flags & TCP_ACK) {
		meant = bpf_htonl(ack);
		/* Knows by itself whether the packet carries a full checksum. */
		if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), told, meant, sizeof(meant)) ||
		    bpf_skb_store_bytes(skb, tcp + offsetof(struct tcphdr, ack_seq), &meant, sizeof(meant), 0))
			return DROP;
	}
	if (seg->tcp_flags & TCP_FIN) {
		flow->client_fin = seg->seq + seg->payload + 1;
		flow->flags |= FLOW_CLIENT_FIN;
	}
	if (flow->flags & FLOW_POD_FIN && ack == flow->pod_fin)
		flow->flags |= FLOW_POD_FIN_ACKED;
	if (seg->tcp_flags & TCP_RST || (flow->flags & all_acked) == all_acked)
		bpf_map_delete_elem(&flows, &seg->flow);
	return PASS;
}

SEC("tc")
int steer(struct __sk_buff *skb)
{
	struct segment seg = {};
	struct flow *flow;
	bool prober;
	__u64 id;

	/* Anything that came in by a device was not sent by a process of this namespace: forwarded, or bridged. */
	if (skb->ingress_ifindex) {
		count(COUNT_PASSED_NOT_PROBER);
		return PASS;
	}
	id = bpf_skb_cgroup_id(skb);
	prober = is_prober(id);
	/* Packets without a socket may belong to a prober's connection all the same, but cannot begin one. */
	if (!prober && id > ROOT_CGROUP_ID) {
		count(COUNT_PASSED_NOT_PROBER);
		return PASS;
	}
	if (!parse_to_pod(skb, &seg)) {
		count(prober ? COUNT_PASSED_NOT_PARSABLE : COUNT_PASSED_NOT_PROBER);
		return PASS;
	}
	if ((seg.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN)
		return steer_syn(skb, &seg, prober);

	flow = bpf_map_lookup_elem(&flows, &seg.flow);
	if (!flow)
		return PASS;
	switch (flow->state) {
	case FLOW_OBSERVING:
		observe_client(skb, &seg, flow);
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

static __always_inline int drop_steered(void)
{
	count(COUNT_DROPPED);
	return XDP_DROP;
}

static __always_inline void note_answer(__u32 ifindex, __u16 port, __u8 kind, __u64 path_hash)
{
	struct tally *tally = find_tally(ifindex, port, kind, path_hash);
	struct evidence *e = find_evidence(ifindex, port, kind, path_hash);
	__u64 now = bpf_ktime_get_boot_ns();

	count(kind == KIND_HTTP ? COUNT_ANSWERED_HTTP : COUNT_ANSWERED_TCP);
	if (tally) {
		__sync_fetch_and_add(&tally->hits, 1);
		tally->answered_at = now;
	}
	/* A connection for its own sake may be answered on what is known of other endpoints of the port only. */
	if (!e || !e->observed_at)
		e = find_evidence(ifindex, port, KIND_PORT, 0);
	if (e)
		count_age(now - e->observed_at);
}

/* Does what steer ordered. Whatever happens, the packet does not stay as it is. */
static __always_inline int obey(struct xdp_md *ctx, __u32 l3_len)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct tcphdr *tcp = data + ETH_HLEN + l3_len;
	void *room = tcp + 1;
	struct reply reply = {};
	struct order order;
	struct evidence *e;

	if (room + STEERED_ROOM > data_end)
		return drop_steered();
	__builtin_memcpy(&order, room, sizeof(order));
	if (order.token != order_token || order.verdict == ORDER_DROP)
		return drop_steered();

	reply.seq = order.seq;
	reply.ack = order.ack;
	reply.mss = order.mss;
	reply.window = order.window;
	reply.tcp_flags = order.tcp_flags;
	reply.swap = order.verdict == ORDER_TO_CLIENT;
	if (order.with_reply) {
		e = find_evidence(ctx->ingress_ifindex, bpf_ntohs(tcp->dest), KIND_HTTP, order.path_hash);
		/* Gone since the order was given: the client asks again. */
		if (!e || !e->reply_len || e->reply_len > REPLY_MAX)
			return drop_steered();
		__builtin_memcpy(room, e->reply, REPLY_MAX);
		reply.payload = e->reply_len;
		reply.payload_sum = e->reply_sum;
	}
	if (order.answers)
		note_answer(ctx->ingress_ifindex, bpf_ntohs(tcp->dest), order.answers, order.path_hash);
	if (rewrite(ctx, l3_len, &reply))
		return drop_steered();
	return order.verdict == ORDER_TO_POD ? XDP_TX : XDP_PASS;
}

/* The pod's side of a probe that was passed on. */
static __always_inline void observe_pod(struct xdp_md *ctx, const struct segment *seg, struct flow *flow)
{
	__u64 now = bpf_ktime_get_boot_ns();
	__u16 status;

	if (seg->tcp_flags & TCP_RST) {
		/* After a good status a reset says nothing certain: the prober may have had the whole answer or not. */
		if (!flow->status) {
			withdraw(seg->flow.ifindex, seg->flow.pod_port, WITHDRAWN_RESET, COUNT_WITHDRAWN_RESET);
			report(&seg->flow, flow, OUTCOME_RESET, flow->flags & FLOW_REQUESTED ? KIND_HTTP : KIND_PORT,
			       now);
		}
		bpf_map_delete_elem(&flows, &seg->flow);
		return;
	}
	if (seg->tcp_flags & TCP_SYN) {
		if (seg->ack != flow->client_isn + 1) { /* another connection's, on the same ports */
			bpf_map_delete_elem(&flows, &seg->flow);
			return;
		}
		flow->pod_isn = seg->seq;
		flow->flags |= FLOW_CONNECTED;
		return;
	}
	if (!(flow->flags & FLOW_REQUESTED) || !seg->payload || seg->seq != flow->pod_isn + 1)
		return;
	status = parse_status(ctx, seg);
	if (status >= 200 && status < 300) {
		flow->status = status;
		return;
	}
	if (status >= 300) {
		flow->status = status;
		withdraw(seg->flow.ifindex, seg->flow.pod_port, WITHDRAWN_STATUS, COUNT_WITHDRAWN_STATUS);
		report(&seg->flow, flow, OUTCOME_STATUS, KIND_HTTP, now);
	}
	/* Otherwise not HTTP/1, an interim response or a status line in pieces: no evidence either way. */
	bpf_map_delete_elem(&flows, &seg->flow);
}

/* The pod answers the replayed SYN, or refuses it. */
static __always_inline int accept_handover(struct xdp_md *ctx, const struct segment *seg, struct flow *flow)
{
	struct reply reply = {};

	if (!(seg->tcp_flags & TCP_ACK) || seg->ack != flow->client_isn + 1)
		return drop_steered(); /* of an earlier connection on the same ports */
	if (seg->tcp_flags & TCP_RST) {
		reply.seq = flow->our_isn + 1;
		reply.ack = seg->ack;
		reply.tcp_flags = TCP_RST | TCP_ACK;
		bpf_map_delete_elem(&flows, &seg->flow);
	} else if (seg->tcp_flags & TCP_SYN) {
		flow->pod_isn = seg->seq;
		flow->state = FLOW_HANDED;
		reply.seq = seg->ack;
		reply.ack = seg->seq + 1;
		reply.tcp_flags = TCP_ACK;
		reply.window = OUR_WINDOW;
		reply.swap = true;
	} else {
		return drop_steered();
	}
	if (rewrite(ctx, seg->l3_len == sizeof(struct iphdr) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr), &reply))
		return drop_steered();
	return reply.swap ? XDP_TX : XDP_PASS;
}

static __always_inline int translate_from_pod(struct xdp_md *ctx, const struct segment *seg, struct flow *flow)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	__u32 l3_len = seg->l3_len == sizeof(struct iphdr) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	void *ip = data + ETH_HLEN;
	struct tcphdr *tcp = ip + l3_len;
	const __u8 all_acked = FLOW_CLIENT_FIN_ACKED | FLOW_POD_FIN_ACKED;
	__be32 told;

	if (seg->tcp_flags & TCP_SYN) {
		if (seg->seq == flow->pod_isn && seg->ack == flow->client_isn + 1)
			return accept_handover(ctx, seg, flow); /* our ACK was lost */
		bpf_map_delete_elem(&flows, &seg->flow);	/* another connection, on the same ports */
		return XDP_PASS;
	}
	if (seg->tcp_flags & TCP_FIN) {
		flow->pod_fin = seg->seq + seg->payload + 1;
		flow->flags |= FLOW_POD_FIN;
	}
	if (flow->flags & FLOW_CLIENT_FIN && seg->ack == flow->client_fin)
		flow->flags |= FLOW_CLIENT_FIN_ACKED;

	if ((void *)(tcp + 1) > data_end)
		return XDP_PASS;
	told = bpf_htonl(seg->seq - flow->pod_isn + flow->our_isn);
	/*
	 * A packet that never left this machine mostly carries the pseudo-header's sum only, which does not cover seq
	 * and must stay for whoever completes it. XDP is not told; a full checksum equals that sum once in 65536
	 * packets.
	 */
	if (tcp->check != fold(pseudo_sum(ip, l3_len, seg->tcp_len + seg->payload)))
		tcp->check = ~fold((__u64)(__u16)~tcp->check + (__u32)~tcp->seq + told);
	tcp->seq = told;
	if (seg->tcp_flags & TCP_RST || (flow->flags & all_acked) == all_acked)
		bpf_map_delete_elem(&flows, &seg->flow);
	return XDP_PASS;
}

SEC("xdp.frags")
int respond(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct segment seg = {};
	struct flow *flow;

	if ((void *)(eth + 1) > data_end)
		return XDP_PASS;
	if (eth->h_proto == bpf_htons(ETH_P_STEERED)) {
		__u8 *version = (void *)(eth + 1);

		if ((void *)(version + 1) > data_end)
			return drop_steered();
		return *version >> 4 == 4 ? obey(ctx, sizeof(struct iphdr)) : obey(ctx, sizeof(struct ipv6hdr));
	}
	if (!parse_from_pod(ctx, &seg))
		return XDP_PASS;
	flow = bpf_map_lookup_elem(&flows, &seg.flow);
	if (!flow)
		return XDP_PASS;
	switch (flow->state) {
	case FLOW_OBSERVING:
		observe_pod(ctx, &seg, flow);
		return XDP_PASS;
	case FLOW_TAKEN:
		/* The pod does not know this connection; a SYN-ACK of its is of one that came after. */
		if (seg.tcp_flags & TCP_SYN)
			bpf_map_delete_elem(&flows, &seg.flow);
		return XDP_PASS;
	case FLOW_HANDING:
		return accept_handover(ctx, &seg, flow);
	case FLOW_HANDED:
		return translate_from_pod(ctx, &seg, flow);
	}
	return XDP_PASS;
}

/* What watch needs of the kernel's types; offsets are those of the running kernel (CO-RE). */
#define KERNEL_TYPE __attribute__((preserve_access_index))
struct ns_common {
	unsigned int inum;
} KERNEL_TYPE;
struct net {
	struct ns_common ns;
} KERNEL_TYPE;
typedef struct {
	struct net *net;
} KERNEL_TYPE possible_net_t;
struct sock_common {
	__u16 skc_num;
	possible_net_t skc_net;
} KERNEL_TYPE;
struct sock {
	struct sock_common __sk_common;
} KERNEL_TYPE;

/* include/net/tcp_states.h */
#define STATE_CLOSE 7
#define STATE_LISTEN 10

/*
 * A listening socket is closed: by its process, or by the kernel because that has ended, however it did. Evidence of
 * its port is void there and then. Another socket may still listen on it (SO_REUSEPORT): then the next probe will tell.
 */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(watch, const struct sock *sk, int oldstate, int newstate)
{
	struct netns_devices *devices;
	__u32 netns;

	/* An accepted connection's socket begins as a copy of the listening one, and leaves that state too. */
	if (oldstate != STATE_LISTEN || newstate != STATE_CLOSE)
		return 0;
	netns = sk->__sk_common.skc_net.net->ns.inum;
	devices = bpf_map_lookup_elem(&pod_netns, &netns);
	if (!devices)
		return 0;
	for (__u32 i = 0; i < DEVICES_PER_NETNS; i++)
		if (devices->ifindex[i])
			withdraw(devices->ifindex[i], sk->__sk_common.skc_num, WITHDRAWN_LISTENER_CLOSED,
				 COUNT_WITHDRAWN_LISTENER_CLOSED);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
