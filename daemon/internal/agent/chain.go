package agent

import (
	"errors"
	"sync/atomic"

	"github.com/probelet/probelet/daemon/internal/install/chain"
)

// chainStatus has the outcome of the last look at the chain. It is safe for concurrent use.
type chainStatus struct{ last atomic.Pointer[chainLook] }

// chainLook is the outcome of a look: what keeps the plugin out of the chain, or nil.
type chainLook struct{ err error }

func (s *chainStatus) looked(err error) { s.last.Store(&chainLook{err}) }

func (s *chainStatus) joined() bool {
	look := s.last.Load()
	return look != nil && look.err == nil
}

// misplaced returns why the plugin is deliberately kept out of the chain; nil if it is not.
func (s *chainStatus) misplaced() error {
	if s == nil {
		return nil
	}
	if look := s.last.Load(); look != nil && errors.Is(look.err, chain.ErrMisplaced) {
		return look.err
	}
	return nil
}
