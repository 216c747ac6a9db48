// Package polltest lets tests poll for a condition instead of sleeping.
package polltest

import (
	"testing"
	"time"
)

// Limit is for whatever takes milliseconds, with room for a busy machine.
const Limit = 20 * time.Second

const interval = 5 * time.Millisecond

// Eventually polls until a condition holds, and fails the test if it does not within Limit. what names the condition.
func Eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	if !Within(Limit, holds) {
		t.Fatalf("not within %s: %s", Limit, what)
	}
}

// Within polls until a condition holds, and reports whether it did within the limit. It is for tests that describe the state found
// instead, or need another limit.
func Within(limit time.Duration, holds func() bool) bool {
	for end := time.Now().Add(limit); !holds(); time.Sleep(interval) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}
