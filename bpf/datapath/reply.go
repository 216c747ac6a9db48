package datapath

import "fmt"

// The range of statuses that have a reply: STATUS_MIN and STATUS_MAX in bpf/abi.h.
const statusMin, statusMax = 200, 299

// reasons maps 2xx statuses to reason phrases (IANA HTTP Status Code Registry). Package net/http has them, but would make the CNI
// plugin a quarter larger.
var reasons = map[int]string{
	200: "OK", 201: "Created", 202: "Accepted", 203: "Non-Authoritative Information", 204: "No Content",
	205: "Reset Content", 206: "Partial Content", 207: "Multi-Status", 208: "Already Reported", 226: "IM Used",
}

// replies returns the reply for each status from statusMin on.
func replies() (all [statusMax - statusMin + 1]probeletReplyText) {
	for i := range all {
		r, text := &all[i], replyText(statusMin+i)
		if len(text) > len(r.Bytes) {
			panic(fmt.Sprintf("reply of status %d has %d bytes: must be at most %d", statusMin+i, len(text), len(r.Bytes)))
		}
		r.Len = uint32(copy(r.Bytes[:], text))
		for i := 0; i < len(r.Bytes); i += 2 { // the bytes beyond Len are 0
			r.Sum += uint32(r.Bytes[i]) | uint32(r.Bytes[i+1])<<8 // little-endian, like the object
		}
	}
	return all
}

// replyText returns a response without a body (RFC 9112) that Cache-Status (RFC 9211) marks as ours.
func replyText(status int) string {
	text := fmt.Sprintf("HTTP/1.1 %d %s\r\n", status, reasons[status])
	if status != 204 { // No Content has no length (RFC 9110, section 8.6)
		text += "Content-Length: 0\r\n"
	}
	return text + "Connection: close\r\nCache-Status: probelet; hit\r\n\r\n"
}
