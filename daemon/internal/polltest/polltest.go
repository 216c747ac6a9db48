// Package polltest lets tests poll for a condition instead of sleeping.
package polltest

import (
	"testing"
	"time"
)

const (
	interval = 5 * time.Millisecond
	timeout  = 10 * time.Second
)

// Eventually polls until a condition holds, and fails the test if it does not within 10 s. what names the condition.
func Eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(timeout); time.Now().Before(end); time.Sleep(interval) {
		if holds() {
			return
		}
	}
	t.Fatalf("not within %s: %s", timeout, what)
}
