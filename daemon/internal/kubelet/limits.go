package kubelet

import (
	"fmt"
	"io"
	"time"
)

// Limits of what is asked of the kubelet.
const (
	// Timeout bounds one answer, from its request to its last byte.
	Timeout = 10 * time.Second
	// MaxAnswer bounds the size of an answer, in bytes. All of them are read piece by piece, so this bounds time more than
	// memory.
	MaxAnswer = 256 << 20
	// Share bounds the part of the time that asking for the same again and again may take: 1 in so many.
	Share = 10
)

// limited fails, rather than ends, where more comes than is allowed.
type limited struct {
	from io.Reader
	most int64
	read int64
}

// Limit returns a reader that fails after most bytes.
func Limit(from io.Reader, most int64) io.Reader { return &limited{from: from, most: most} }

func (l *limited) Read(p []byte) (int, error) {
	left := l.most - l.read
	if left <= 0 {
		return 0, fmt.Errorf("answer of more than %d MiB", l.most>>20)
	}
	n, err := l.from.Read(p[:min(int64(len(p)), left)])
	l.read += int64(n)
	return n, err
}
