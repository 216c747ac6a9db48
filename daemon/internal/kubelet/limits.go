package kubelet

import (
	"fmt"
	"io"
	"time"
)

// Limits on requests to the kubelet.
const (
	// Timeout bounds one answer, from its request to its last byte.
	Timeout = 10 * time.Second
	// MaxAnswer bounds the size of an answer, in bytes. The list of pods is read pod by pod, and metrics line by line, so
	// it bounds time more than memory.
	MaxAnswer = 256 << 20
	// Share bounds the time spent on repeated requests: 1 part in Share.
	Share = 10
)

// limited fails instead of ending at its limit.
type limited struct {
	from  io.Reader
	limit int64
	read  int64
}

// Limit returns a reader that fails, instead of ending, after limit bytes.
func Limit(from io.Reader, limit int64) io.Reader { return &limited{from: from, limit: limit} }

func (l *limited) Read(p []byte) (int, error) {
	left := l.limit - l.read
	if left <= 0 {
		return 0, fmt.Errorf("answer of more than %d MiB", l.limit>>20)
	}
	n, err := l.from.Read(p[:min(int64(len(p)), left)])
	l.read += int64(n)
	return n, err
}
