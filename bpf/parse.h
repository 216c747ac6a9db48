/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Parsing packets. Anything not fully understood is rejected, never guessed. */
#ifndef PROBELET_PARSE_H
#define PROBELET_PARSE_H

#include "maps.h"
#include "scratch.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10
#define TCP_URG 0x20

#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */

/* A TCP segment between a client and a pod, seen from either side. */
struct segment {
	struct flow_key flow;
	bool may_have_flow;    /* false: it has none */
	bool may_show_traffic; /* false: the pod sent nothing that may be evidence */
	__u32 l3_len;
	__u32 tcp_len; /* header with options */
	__u32 payload; /* bytes, without padding */
	__u32 seq;
	__u32 ack;
	__u16 window;
	__u8 tcp_flags;
};

static __always_inline void map_ipv4(__u8 addr[16], __be32 ipv4)
{
	__builtin_memset(addr, 0, 10);
	addr[10] = addr[11] = 0xff;
	__builtin_memcpy(addr + 12, &ipv4, 4);
}

/* Hop-by-hop header of a packet above 64 KiB, with only this option (RFC 2675; ipv6_has_hopopt_jumbo in the kernel). */
struct jumbo_header {
	__u8 next;
	__u8 len;
	__u8 option;
	__u8 option_len;
	__be32 payload;
};
#define JUMBO_OPTION 0xc2

enum finding {
	NOT_TCP,   /* or TCP in a form that no flow takes: a fragment, IP options, extension headers */
	CUT_SHORT, /* the headers are not all in the linear part of the skb */
	FOUND,
};

/*
 * Finds the TCP header and the length of the headers before it. This reads packets directly, because most are not ours
 * and pay for nothing else. Packets are never written directly, because for a program that does, the kernel makes every
 * packet writable.
 */
static __always_inline enum finding find_tcp(struct __sk_buff *skb, struct tcphdr **tcp, __u32 *l3_len)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	void *l4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;

		l4 = ip + 1;
		*l3_len = sizeof(*ip);
		if (l4 > data_end)
			return CUT_SHORT;
		if (*(__u8 *)ip != 0x45 || ip->protocol != IPPROTO_TCP || ip->frag_off & bpf_htons(IP_FRAGMENT))
			return NOT_TCP;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;
		struct jumbo_header *jumbo = (void *)(ip + 1);

		l4 = ip + 1;
		*l3_len = sizeof(*ip);
		if (l4 > data_end)
			return CUT_SHORT;
		if (ip->version != 6)
			return NOT_TCP;
		if (ip->nexthdr == IPPROTO_HOPOPTS && !ip->payload_len) {
			l4 = jumbo + 1;
			*l3_len += sizeof(*jumbo);
			if (l4 > data_end)
				return CUT_SHORT;
			if (jumbo->next != IPPROTO_TCP || jumbo->len || jumbo->option != JUMBO_OPTION)
				return NOT_TCP;
		} else if (ip->nexthdr != IPPROTO_TCP) {
			return NOT_TCP;
		}
	} else {
		return NOT_TCP;
	}
	*tcp = l4;
	if ((void *)(*tcp + 1) > data_end)
		return CUT_SHORT;
	return FOUND;
}

static __always_inline __u8 flags_of(const struct tcphdr *tcp)
{
	return ((const __u8 *)tcp)[13];
}

/* Reports whether a segment opens a connection. */
static __always_inline bool begins(__u8 tcp_flags)
{
	return (tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

static __always_inline __u32 *flow_port_slot(__u16 client_port)
{
	__u32 slot = client_port;

	/* Keeps the mask after the byte swap: verifiers before 6.4 lose bounds in a swap. */
	asm volatile("" : "+r"(slot));
	return &flow_ports[slot & (FLOW_PORT_SLOTS - 1)];
}

/* Reports whether traffic from a pod's port may be evidence. trafficSlot in bpf/datapath computes the same slot. */
static __always_inline bool may_show_traffic(__u32 ifindex, __u16 pod_port)
{
	__u32 slot = (ifindex * 31 + pod_port) & (TRAFFIC_SLOTS - 1),
	      *wanted = bpf_map_lookup_elem(&traffic_slots, &slot);

	return wanted && *wanted;
}

/* Reads the segment whose TCP header find_tcp has found. Returns false if its lengths are inconsistent. */
static __always_inline bool read_segment(struct __sk_buff *skb, struct segment *s, bool from_pod,
					 const struct tcphdr *tcp)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u16 source = bpf_ntohs(tcp->source), dest = bpf_ntohs(tcp->dest);
	__u8 *from = from_pod ? s->flow.pod_addr : s->flow.client_addr;
	__u8 *to = from_pod ? s->flow.client_addr : s->flow.pod_addr;
	__u32 bytes; /* of the segment including its header */

	s->tcp_flags = flags_of(tcp);
	s->tcp_len = tcp->doff * 4;
	s->seq = bpf_ntohl(tcp->seq);
	s->ack = bpf_ntohl(tcp->ack_seq);
	s->window = bpf_ntohs(tcp->window);
	s->flow.pod_port = from_pod ? source : dest;
	s->flow.client_port = from_pod ? dest : source;
	s->flow.ifindex = skb->ifindex;
	if (s->l3_len == sizeof(struct iphdr)) {
		struct iphdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > data_end)
			return false;
		map_ipv4(from, ip->saddr);
		map_ipv4(to, ip->daddr);
		bytes = bpf_ntohs(ip->tot_len);
		if (bytes && bytes < sizeof(*ip))
			return false;
		bytes = bytes ? bytes - sizeof(*ip) : 0;
	} else {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > data_end)
			return false;
		__builtin_memcpy(from, &ip->saddr, 16);
		__builtin_memcpy(to, &ip->daddr, 16);
		bytes = bpf_ntohs(ip->payload_len);
	}
	if (!bytes) /* above 64 KiB (BIG TCP) only the skb knows the length */
		bytes = skb->len - ETH_HLEN - s->l3_len;
	if (s->tcp_len < sizeof(*tcp) || bytes < s->tcp_len || ETH_HLEN + s->l3_len + bytes > skb->len)
		return false;
	s->payload = bytes - s->tcp_len;
	return true;
}

/* Parses a packet that may belong to a flow, begin one, or show traffic. Returns false for all others. */
static __always_inline bool parse(struct __sk_buff *skb, struct segment *s, bool from_pod)
{
	struct tcphdr *tcp = NULL;
	enum finding finding = find_tcp(skb, &tcp, &s->l3_len);

	if (finding == CUT_SHORT && skb->len >= ETH_HLEN + s->l3_len + sizeof(*tcp)) {
		if (bpf_skb_pull_data(skb, ETH_HLEN + s->l3_len + sizeof(*tcp)))
			return false;
		finding = find_tcp(skb, &tcp, &s->l3_len);
	}
	if (finding != FOUND)
		return false;
	s->may_have_flow = *flow_port_slot(bpf_ntohs(from_pod ? tcp->dest : tcp->source));
	s->may_show_traffic = from_pod && may_show_traffic(skb->ifindex, bpf_ntohs(tcp->source));
	if (!s->may_have_flow && !s->may_show_traffic && (from_pod || !begins(flags_of(tcp))))
		return false;
	return read_segment(skb, s, from_pod, tcp);
}

/*
 * The loops below are in global functions, so that the verifier checks each only once, instead of once per exit of the
 * preceding one.
 */

/*
 * Hashes the request in s->bytes: NH (RFC 4418, section 5.2) under two independent keys. Two different requests have
 * the same hash under one of them with a probability of 2^-32 over the keys (Black et al., UMAC, CRYPTO 1999, theorem
 * 4.2). Returns 0.
 */
__noinline int hash_request(struct scratch *s)
{
	__u64 hash, check;
	__u32 last;

	if (!s)
		return 0;
	hash = check = s->len;
	last = s->len / 8;
	if (last < REQUEST_MAX / 8) /* clear what an earlier packet left behind the request */
		s->words[last] &= (1ULL << s->len % 8 * 8) - 1;
	for (__u32 i = 0; i < REQUEST_MAX / 8; i++) {
		__u64 word = s->words[i];
		__u32 low = word, high = word >> 32;

		if (8 * i >= s->len)
			break;
		hash += (__u64)(low + question_keys[i].hash[0]) * (high + question_keys[i].hash[1]);
		check += (__u64)(low + question_keys[i].check[0]) * (high + question_keys[i].check[1]);
	}
	s->asked.hash = hash;
	s->asked.check = check;
	return 0;
}

/*
 * Parses a SYN's options in s->bytes and stores its MSS in s->mss. Returns 0, or -1 if they are malformed or include
 * one that an answer would have to honour (MD5, authentication, fast open …).
 */
__noinline int read_syn_options(struct scratch *s)
{
	__u32 skip = 0, kind = 0, position = 0;

	if (!s)
		return -1;
	s->mss = 0;
	for (__u32 i = 0; i < 40; i++) {
		__u8 c = s->bytes[i];

		if (i >= s->len)
			break;
		if (position == 0) {
			if (c == 0) /* end of options */
				return 0;
			if (c == 1) /* padding */
				continue;
			/* MSS, window scale, SACK permitted, timestamps (RFC 9293, 7323, 2018) */
			if (c != 2 && c != 3 && c != 4 && c != 8)
				return -1;
			kind = c;
			position = 1;
		} else if (position == 1) {
			if (c < 2 || (kind == 2 && c != 4))
				return -1;
			skip = c - 2;
			position = skip ? 2 : 0;
		} else {
			if (kind == 2)
				s->mss = s->mss << 8 | c;
			if (--skip == 0)
				position = 0;
		}
	}
	return position ? -1 : 0;
}

/* The start and the end of every request that is answered. */
static const char http_get[] = "GET /";
static const char http_end[] = "\r\n\r\n";

#define LITERAL_LEN(literal) (sizeof(literal) - 1)

/*
 * Returns the question that a segment asks, or NULL if it cannot be a whole request without a body. The daemon checks
 * once whether it is one: it attributes a question to an endpoint only if all bytes match, and nothing else was sent on
 * the connection.
 */
static __always_inline const struct question *read_question(struct __sk_buff *skb, const struct segment *seg)
{
	struct scratch *s = get_scratch();
	__u32 offset = ETH_HLEN + seg->l3_len + seg->tcp_len;
	__u32 len = seg->payload;

	if (!s || len < LITERAL_LEN(http_get) + LITERAL_LEN(http_end) ||
	    !load_scratch(skb, s, offset, len, REQUEST_MAX))
		return NULL;
	for (__u32 i = 0; i < LITERAL_LEN(http_get); i++)
		if (s->bytes[i] != http_get[i])
			return NULL;
	for (__u32 i = 0; i < LITERAL_LEN(http_end); i++)
		if (s->bytes[(len - LITERAL_LEN(http_end) + i) & (REQUEST_MAX - 1)] != http_end[i])
			return NULL;
	hash_request(s);
	return &s->asked;
}

/* The options of a SYN in the order in which Linux sends them (tcp_options_write). */
struct linux_syn_options {
	__u8 mss_kind, mss_len;
	__be16 mss;
	__u8 sack[2], timestamps[2];
	__be32 timestamp, echo;
	__u8 nop, scale[2], shift;
};

/* Reports whether a SYN has the usual options, which saves the loop. */
static __always_inline bool is_linux(const struct linux_syn_options *o)
{
	return o->mss_kind == 2 && o->mss_len == 4 && o->sack[0] == 4 && o->sack[1] == 2 && o->timestamps[0] == 8 &&
	       o->timestamps[1] == 10 && o->nop == 1 && o->scale[0] == 3 && o->scale[1] == 3;
}

/* Reads the MSS of a SYN or SYN-ACK, 0 if it has none. Returns false if read_syn_options would refuse its options. */
static __always_inline bool parse_syn_options(struct __sk_buff *skb, const struct segment *seg, __u16 *mss)
{
	__u32 len = seg->tcp_len - sizeof(struct tcphdr), offset = ETH_HLEN + seg->l3_len + sizeof(struct tcphdr);
	struct linux_syn_options usual;
	struct scratch *s;

	*mss = 0;
	if (len == 0)
		return true;
	if (len == sizeof(usual) && !bpf_skb_load_bytes(skb, offset, &usual, sizeof(usual)) && is_linux(&usual)) {
		*mss = bpf_ntohs(usual.mss);
		return true;
	}
	s = get_scratch();
	if (!s || !load_scratch(skb, s, offset, len, 40) || read_syn_options(s))
		return false;
	*mss = s->mss;
	return true;
}

/* Returns the status of "HTTP/1.x NNN" at the start of the payload, or 0. */
static __always_inline __u16 parse_status(struct __sk_buff *skb, const struct segment *seg)
{
	__u8 line[12];

	if (bpf_skb_load_bytes(skb, ETH_HLEN + seg->l3_len + seg->tcp_len, line, sizeof(line)))
		return 0;
	if (line[0] != 'H' || line[1] != 'T' || line[2] != 'T' || line[3] != 'P' || line[4] != '/' || line[5] != '1' ||
	    line[6] != '.' || line[8] != ' ')
		return 0;
	for (__u32 i = 9; i < 12; i++)
		if (line[i] < '0' || line[i] > '9')
			return 0;
	return (line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0');
}

#endif
