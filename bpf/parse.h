/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* What a packet says. Anything not understood is said to be so, never guessed. */
#ifndef PROBELET_PARSE_H
#define PROBELET_PARSE_H

#include "abi.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10

#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */

/* A TCP segment between a client and a pod, seen from either side. */
struct segment {
	struct flow_key flow;
	__u32 l3_len;
	__u32 tcp_len; /* header with options */
	__u32 payload; /* bytes, padding of the frame not included */
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

static __always_inline bool read_ipv4(struct segment *s, const struct iphdr *ip, bool from_pod)
{
	__u32 total = bpf_ntohs(ip->tot_len);

	if (ip->version != 4 || ip->ihl != 5 || ip->protocol != IPPROTO_TCP || ip->frag_off & bpf_htons(IP_FRAGMENT))
		return false;
	map_ipv4(from_pod ? s->flow.pod_addr : s->flow.client_addr, ip->saddr);
	map_ipv4(from_pod ? s->flow.client_addr : s->flow.pod_addr, ip->daddr);
	s->l3_len = sizeof(*ip);
	s->payload = total > sizeof(*ip) ? total - sizeof(*ip) : 0;
	return true;
}

static __always_inline bool read_ipv6(struct segment *s, const struct ipv6hdr *ip, bool from_pod)
{
	if (ip->version != 6 || ip->nexthdr != IPPROTO_TCP)
		return false;
	__builtin_memcpy(from_pod ? s->flow.pod_addr : s->flow.client_addr, &ip->saddr, 16);
	__builtin_memcpy(from_pod ? s->flow.client_addr : s->flow.pod_addr, &ip->daddr, 16);
	s->l3_len = sizeof(*ip);
	s->payload = bpf_ntohs(ip->payload_len);
	return true;
}

static __always_inline bool read_tcp(struct segment *s, const struct tcphdr *tcp, bool from_pod)
{
	__u16 source = bpf_ntohs(tcp->source), dest = bpf_ntohs(tcp->dest);

	s->tcp_len = tcp->doff * 4;
	if (s->tcp_len < sizeof(*tcp))
		return false;
	s->flow.pod_port = from_pod ? source : dest;
	s->flow.client_port = from_pod ? dest : source;
	s->payload = s->payload > s->tcp_len ? s->payload - s->tcp_len : 0;
	s->seq = bpf_ntohl(tcp->seq);
	s->ack = bpf_ntohl(tcp->ack_seq);
	s->window = bpf_ntohs(tcp->window);
	s->tcp_flags = ((const __u8 *)tcp)[13];
	return true;
}

/* A client's packet at tc egress. Headers may lie anywhere in the skb, hence copies. */
static __always_inline bool parse_to_pod(struct __sk_buff *skb, struct segment *s)
{
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	} ip;
	struct tcphdr tcp;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip.v4, sizeof(ip.v4)) || !read_ipv4(s, &ip.v4, false))
			return false;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip.v6, sizeof(ip.v6)) || !read_ipv6(s, &ip.v6, false))
			return false;
	} else {
		return false;
	}
	if (!s->payload) /* more than 64 KiB (BIG TCP): the IP header cannot say it, the skb can */
		s->payload = skb->len - ETH_HLEN - s->l3_len;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + s->l3_len, &tcp, sizeof(tcp)) || !read_tcp(s, &tcp, false))
		return false;
	if (ETH_HLEN + s->l3_len + s->tcp_len + s->payload > skb->len)
		return false;
	s->flow.ifindex = skb->ifindex;
	return true;
}

/* A pod's packet at XDP. */
static __always_inline bool parse_from_pod(struct xdp_md *ctx, struct segment *s)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct tcphdr *tcp;

	if ((void *)(eth + 1) > data_end)
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > data_end || !read_ipv4(s, ip, true))
			return false;
		tcp = (void *)(ip + 1);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > data_end || !read_ipv6(s, ip, true))
			return false;
		tcp = (void *)(ip + 1);
	} else {
		return false;
	}
	if ((void *)(tcp + 1) > data_end || !read_tcp(s, tcp, true))
		return false;
	s->flow.ifindex = ctx->ingress_ifindex;
	return true;
}

/* Bytes of a packet that are looked at one by one, with what was found. */
struct scratch {
	__u8 bytes[REQUEST_MAX];
	__u64 path_hash;
	__u32 path_end;
	__u32 len;
	__u16 mss;
};

/* key 0; value: working memory of steer, per CPU; nothing in it outlives one packet. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/*
 * The loops below are functions of their own, and global, so that the verifier looks at each once and not again for
 * every way out of the one before.
 */

#define PATH_START 4 /* behind "GET " */

/* Hashes the path (FNV-1a, 64 bits) and finds its end. Returns 0 if there is a path of at most PATH_MAX bytes. */
__noinline int find_path(struct scratch *s)
{
	__u64 hash = 0xcbf29ce484222325ULL;

	if (!s)
		return -1;
	for (__u32 i = PATH_START; i <= PATH_START + PATH_MAX; i++) {
		__u8 c = s->bytes[i];

		if (c == ' ') {
			s->path_hash = hash;
			s->path_end = i;
			return 0;
		}
		if (c < 0x21 || c > 0x7e)
			return -1;
		hash = (hash ^ c) * 0x100000001b3ULL;
	}
	return -1;
}

/* Returns the length of the header section, including the empty line that ends it, or -1. */
__noinline int find_header_end(struct scratch *s)
{
	__u32 window = 0;

	if (!s)
		return -1;
	for (__u32 i = 0; i < REQUEST_MAX; i++) {
		if (i >= s->len)
			break;
		window = window << 8 | s->bytes[i];
		if (window == 0x0d0a0d0a)
			return i + 1;
	}
	return -1;
}

/*
 * Reads a SYN's options, len bytes in s->bytes: the MSS into s->mss. Returns -1 for one that we would have to honour
 * and do not know (MD5, authentication, fast open …).
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

static __always_inline struct scratch *get_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* Copies len bytes of the packet, of which there are 1 to max, to where they can be looked at. */
static __always_inline bool load_scratch(struct __sk_buff *skb, struct scratch *s, __u32 offset, __u32 len, __u32 max)
{
	if (len < 1 || len > max)
		return false;
	s->len = len;
	/* Changes nothing, but verifiers before 6.3 do not conclude from the comparisons that len is not 0. */
	asm volatile("" : "+r"(len));
	len = ((len - 1) & (REQUEST_MAX - 1)) + 1;
	return !bpf_skb_load_bytes(skb, offset, s->bytes, len);
}

static const char http_get[] = "GET /";
static const char http_version[] = " HTTP/1.1\r\n";
static const char http_close[] = "\r\nConnection: close\r\n\r\n";

#define LITERAL_LEN(literal) (sizeof(literal) - 1)
#define REQUEST_MIN (LITERAL_LEN(http_get) + LITERAL_LEN(http_version) + LITERAL_LEN(http_close) - 2)

/*
 * The request as Kubernetes' prober sends it (pkg/probe/http, Go's net/http): one GET, whole, HTTP/1.1, in one
 * segment, its last header "Connection: close". So it has no body, is not split, and nothing can follow it.
 */
static __always_inline bool parse_request(struct __sk_buff *skb, const struct segment *seg, __u64 *path_hash)
{
	struct scratch *s = get_scratch();
	__u32 offset = ETH_HLEN + seg->l3_len + seg->tcp_len;
	__u32 len = seg->payload;

	if (!s || len < REQUEST_MIN || !load_scratch(skb, s, offset, len, REQUEST_MAX))
		return false;
	for (__u32 i = 0; i < LITERAL_LEN(http_get); i++)
		if (s->bytes[i] != http_get[i])
			return false;
	if (find_path(s) || find_header_end(s) != (int)len)
		return false;
	for (__u32 i = 0; i < LITERAL_LEN(http_version); i++)
		if (s->bytes[(s->path_end + i) & (REQUEST_MAX - 1)] != http_version[i])
			return false;
	for (__u32 i = 0; i < LITERAL_LEN(http_close); i++)
		if (s->bytes[(len - LITERAL_LEN(http_close) + i) & (REQUEST_MAX - 1)] != http_close[i])
			return false;
	*path_hash = s->path_hash;
	return true;
}

/* Returns whether all options of a SYN are understood. */
static __always_inline bool parse_syn_options(struct __sk_buff *skb, const struct segment *seg, __u16 *mss)
{
	struct scratch *s = get_scratch();
	__u32 len = seg->tcp_len - sizeof(struct tcphdr);

	*mss = 0;
	if (len == 0)
		return true;
	if (!s || !load_scratch(skb, s, ETH_HLEN + seg->l3_len + sizeof(struct tcphdr), len, 40) || read_syn_options(s))
		return false;
	*mss = s->mss;
	return true;
}

/* Returns the status of "HTTP/1.x NNN" at the start of the payload, or 0. */
static __always_inline __u16 parse_status(struct xdp_md *ctx, const struct segment *seg)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	__u32 offset = ETH_HLEN + seg->l3_len + seg->tcp_len;
	__u8 line[12];

	if (offset > ETH_HLEN + sizeof(struct ipv6hdr) + 60)
		return 0;
	if (data + offset + sizeof(line) <= data_end)
		__builtin_memcpy(line, data + offset, sizeof(line));
	else if (!have_xdp_load_bytes || bpf_xdp_load_bytes(ctx, offset, line, sizeof(line)))
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
