package probe

import "iter"

// Verdicts yields the result that an outcome means for each endpoint it affects, whether or not it is news; Unknown if
// that is uncertain.
func (t *Tracker) Verdicts(o Outcome) iter.Seq2[Endpoint, Result] {
	return func(yield func(Endpoint, Result) bool) {
		for _, s := range t.specs {
			if !s.Observed || !t.entries[s.Endpoint].concerned(o) {
				continue
			}
			result, conclusive := s.judge(o)
			if !conclusive {
				result = Unknown
			}
			if !yield(s.Endpoint, result) {
				return
			}
		}
	}
}
